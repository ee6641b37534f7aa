"""Masking zeroes exactly the top k units, tells what it did, and can take it back bit for bit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastfisher import masking
from fastfisher.masking import Mask, fisher_mask_, random_mask_, select_top

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TINY = 2.0**-149  # the smallest float32 denormal


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def snapshot(model: nn.Module) -> list[tuple[Tensor, int, int]]:
    """Bits, version and address of every parameter and buffer."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(bits(t).clone(), t._version, t.data_ptr()) for t in tensors]


def same(after: list[tuple[Tensor, int, int]], before: list[tuple[Tensor, int, int]]) -> bool:
    return all(
        torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(after, before, strict=True)
    )


def fishers(model: nn.Module, seed: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator).to(dtype or p.dtype)
        for name, p in model.named_parameters()
    }


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 5, 2), nn.Flatten(), nn.Linear(7, 6)
    )


def stable_sort_masks(scores: list[Tensor], k: int) -> list[Tensor]:
    """The reference: one stable descending sort of everything."""
    everything = torch.cat([s.reshape(-1).double() for s in scores])
    order = torch.sort(everything, descending=True, stable=True).indices
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[order[:k]] = True
    parts = chosen.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def assert_same_masks(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for mask, reference in zip(got, expected, strict=True):
        assert mask.dtype == torch.bool and mask.is_contiguous()
        assert torch.equal(mask, reference)


# The selection.


VALUE_POOLS = {
    "tied": [-1.0, -0.0, 0.0, 0.5, 1.0],
    "denormal": [-2 * TINY, -TINY, -0.0, 0.0, TINY, 2 * TINY, 2.0**-126],
    "extreme": [-math.inf, -3.0e38, 3.0e38, math.inf, 1.0],
}


@st.composite
def score_lists(draw: st.DrawFn) -> tuple[list[Tensor], int]:
    elements: st.SearchStrategy[float] = st.floats(width=32, allow_nan=False)
    pool = draw(st.sampled_from([*VALUE_POOLS, "any"]))
    if pool != "any":
        elements = st.sampled_from(VALUE_POOLS[pool])
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    dtypes = draw(st.sampled_from([FLOATS, [torch.float32], [torch.float64], [torch.bfloat16]]))
    scores = []
    for shape in draw(st.lists(shapes, min_size=1, max_size=6)):
        size = math.prod(shape)
        values = draw(st.lists(elements, min_size=size, max_size=size))
        dtype = draw(st.sampled_from(dtypes))
        scores.append(torch.tensor(values, dtype=torch.float64).to(dtype).view(shape))
    return scores, draw(st.integers(0, sum(s.numel() for s in scores)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(score_lists())
def test_selection_equals_a_stable_sort(case: tuple[list[Tensor], int]) -> None:
    scores, k = case
    assert_same_masks(select_top(scores, k), stable_sort_masks(scores, k))


def many_scores(kind: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = torch.randint(0, 900, (120,), generator=generator).tolist()
    scores = []
    for size in sizes:
        noise = torch.randn(size, generator=generator, dtype=torch.float64)
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        scores.append(
            {
                "random": noise,
                "all equal": torch.full_like(noise, 0.25),
                "heavily tied": noise.round(),
                "denormal": (noise * 3).round() * step,
            }[kind].to(dtype)
        )
    return scores


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["random", "all equal", "heavily tied", "denormal"])
def test_selection_over_many_tensors(kind: str, dtype: torch.dtype) -> None:
    scores = many_scores(kind, dtype)
    total = sum(s.numel() for s in scores)
    if kind == "denormal":
        assert torch.cat(scores).unique().numel() > 10
    before = [bits(s).clone() for s in scores]
    for k in (0, 1, total // 50, total // 2, total - 1, total):
        masks = select_top(scores, k)
        assert_same_masks(masks, stable_sort_masks(scores, k))
        assert sum(int(m.sum()) for m in masks) == k
    assert all(torch.equal(bits(s), b) for s, b in zip(scores, before, strict=True))


def test_selection_breaks_ties_by_tensor_then_index() -> None:
    scores = [torch.tensor([0.0, 1.0, -0.0]), torch.tensor([[-0.0, 2.0], [0.0, 0.0]])]
    masks = select_top(scores, 5)
    assert masks[0].tolist() == [True, True, True]
    assert masks[1].tolist() == [[True, True], [False, False]]


def test_selection_ranks_nan_lowest() -> None:
    scores = [
        torch.tensor([math.nan, -math.inf, 1.0, -math.nan], dtype=torch.float32),
        torch.tensor([math.nan, 2.0, -3.0], dtype=torch.bfloat16),
    ]
    flat = [float(x) for s in scores for x in s]
    order = sorted(
        range(7), key=lambda i: (math.isnan(flat[i]), -flat[i] if flat[i] == flat[i] else 0)
    )
    for k in range(8):
        chosen = torch.cat(select_top(scores, k)).nonzero().squeeze(1).tolist()
        assert chosen == sorted(order[:k])


def test_selection_reads_strided_scores_in_index_order() -> None:
    base = torch.tensor([[3.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    scores = [base.t(), base[:, ::2], base.expand(2, 2, 3)]
    for k in range(22):
        assert_same_masks(select_top(scores, k), stable_sort_masks(scores, k))


def test_selection_sees_denormals_where_the_processor_flushes_them() -> None:
    scores = [torch.tensor([0.0, TINY, -TINY, 2 * TINY, -0.0])]
    expected = stable_sort_masks(scores, 3)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        masks = select_top(scores, 3)
    finally:
        torch.set_flush_denormal(False)
    assert_same_masks(masks, expected)


@pytest.mark.parametrize("first", [0, 0x3F80FFF8, -0x3F820008, 0x7F7FFFF0])
def test_selection_tells_neighbouring_floats_apart(first: int) -> None:
    # Also across the digits of 16 bits that a radix select works with.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)) + first
    order = torch.cat([order, order.flip(0), order])
    narrow = order.to(torch.int32).view(torch.float32)
    wide = (order << 32).view(torch.float64)
    for scores in ([narrow[:5], narrow[5:]], [wide[:9], wide[9:]]):
        for k in range(49):
            assert_same_masks(select_top(scores, k), stable_sort_masks(scores, k))


def test_selection_refuses_bad_input() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        select_top([torch.zeros(2, dtype=torch.int64)], 1)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            select_top([torch.zeros(3)], k)


# The number of units.


@pytest.mark.parametrize(
    ("ratio", "units", "k"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.29, 99, 28),
        (math.nextafter(0.29, 0), 100, 28),
        (3 / 7, 7, 3),
        (1 / 3, 3, 1),
        (0.1, 9, 0),
        (math.nextafter(5 / 6, 0), 6, 4),
        (0.0, 5, 0),
        (1.0, 5, 5),
        (5e-324, 10**12, 0),
    ],
)
def test_count_is_the_floor(ratio: float, units: int, k: int) -> None:
    assert masking._unit_count(ratio, units) == k
    model = nn.Linear(1, units, bias=False) if units < 1000 else None
    if model is not None:
        assert fisher_mask_(model, fishers(model, 0), ratio=ratio).k == k


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 10**9))
def test_count_is_that_of_the_decimal_as_written(millionths: int, units: int) -> None:
    written = Fraction(millionths, 10**6)
    assert masking._unit_count(float(written), units) == math.floor(written * units)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 10**9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_count_gives_back_a_quotient_of_counts(case: tuple[int, int]) -> None:
    k, units = case
    assert masking._unit_count(k / units, units) == k


# fisher_mask_, one scalar a unit.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.37])
def test_mask_zeroes_the_top_scores_and_nothing_else(dtype: torch.dtype, weight: float) -> None:
    model = small_net().to(dtype)
    forget, remain = fishers(model, 1), fishers(model, 2)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = snapshot(model)
    scores = [forget[n] - remain[n] * weight for n in original]
    total = sum(s.numel() for s in scores)
    k = math.floor(Fraction("0.13") * total)
    expected = stable_sort_masks(scores, k)

    mask = fisher_mask_(model, forget, remain, ratio=0.13, remain_weight=weight)

    assert (mask.k, mask.zeroed, mask.units) == (k, k, total)
    assert (mask.ratio, mask.granularity, mask.remain_weight) == (0.13, "parameter", weight)
    assert mask.threshold == min(
        float(s[m].min()) for s, m in zip(scores, expected, strict=True) if m.any()
    )
    assert_same_masks(list(mask.as_dict().values()), expected)
    assert list(mask.as_dict()) == list(original)
    assert mask.counts == {n: int(m.sum()) for n, m in zip(original, expected, strict=True)}
    for (name, p), chosen, (_, version, address) in zip(
        model.named_parameters(), expected, before[: len(expected)], strict=True
    ):
        assert torch.equal(bits(p), bits(original[name].masked_fill(chosen, 0.0)))
        assert p.data_ptr() == address
        assert (p._version > version) == bool(chosen.any())
        assert p.requires_grad and p.grad is None
    assert same(snapshot(model)[len(expected) :], before[len(expected) :])  # the buffers


def test_score_is_two_rounded_operations() -> None:
    # Fused, f - r * w would be -2**-24 and lose; rounded twice it is 0 and wins the tie by index.
    model = nn.Linear(2, 1, bias=False)
    r, w = 1 + 2.0**-12, 1 + 2.0**-12
    product = float(torch.tensor(r) * torch.tensor(w))
    assert product != r * w
    forget, remain = (
        {"weight": torch.tensor([[product, 0.0]])},
        {"weight": torch.tensor([[r, 0.0]])},
    )
    mask = fisher_mask_(model, forget, remain, ratio=0.5, remain_weight=w)
    assert mask.as_dict()["weight"].tolist() == [[True, False]]
    assert mask.threshold == 0.0


def test_negative_zero_is_a_threshold_of_zero() -> None:
    model = nn.Linear(2, 1, bias=False)
    mask = fisher_mask_(model, {"weight": torch.tensor([[-0.0, -1.0]])}, ratio=0.5)
    assert str(mask.threshold) == "0.0"


def test_without_remain_the_score_is_forget_alone() -> None:
    model = nn.Linear(4, 3)
    forget = fishers(model, 3)
    mask = fisher_mask_(model, forget, ratio=0.4, remain_weight=5.0)
    assert_same_masks(list(mask.as_dict().values()), stable_sort_masks(list(forget.values()), 6))
    assert mask.remain_weight is None


@pytest.mark.filterwarnings("error")
def test_a_fisher_that_requires_grad_serves_as_well() -> None:
    model = nn.Linear(4, 3)
    forget = {name: f.requires_grad_() for name, f in fishers(model, 3).items()}
    assert fisher_mask_(model, forget, forget, ratio=0.4).k == 6


def test_ties_follow_the_order_of_the_model_not_of_the_fisher() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    forget = {n: torch.ones_like(p) for n, p in reversed(list(model.named_parameters()))}
    mask = fisher_mask_(model, forget, ratio=0.5)
    assert mask.counts == {"0.weight": 4, "0.bias": 2, "1.weight": 0, "1.bias": 0}


@pytest.mark.parametrize("ratio", [0.0, 1e-6])
@pytest.mark.parametrize("granularity", ["parameter", "kernel"])
def test_nothing_to_mask_modifies_nothing(ratio: float, granularity: masking.Granularity) -> None:
    model = small_net()
    before = snapshot(model)
    mask = fisher_mask_(model, fishers(model, 0), ratio=ratio, granularity=granularity)
    random = random_mask_(model, ratio=ratio, granularity=granularity)
    for empty in (mask, random):
        assert (empty.k, empty.zeroed, empty.threshold) == (0, 0, None)
        assert not any(m.any() for m in empty.as_dict().values())
        empty.apply_(model)
        empty.undo_(model)
    assert same(snapshot(model), before)


def test_ratio_one_zeroes_all_that_is_scored() -> None:
    model = small_net()
    forget = fishers(model, 0)
    fisher_mask_(model, forget, ratio=1)
    assert all(not p.any() for p in model.parameters())
    model = small_net()
    mask = fisher_mask_(model, forget, ratio=1.0, granularity="kernel")
    assert [n for n, p in model.named_parameters() if not p.any()] == [
        "0.weight",
        "1.bias",  # zero from the start
        "2.weight",
        "4.weight",
    ]
    assert mask.k == mask.units == 4 * 3 + 5 * 4 + 6 * 7


def test_parameters_the_fisher_does_not_name_stay() -> None:
    model = small_net()
    forget = {"4.bias": torch.ones(6)}
    mask = fisher_mask_(model, forget, ratio=1)
    assert (mask.units, list(mask.counts)) == (6, ["4.bias"])
    assert not model.get_parameter("4.bias").any() and model.get_parameter("4.weight").all()


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["4.*"], ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]),
        (["*.bias", "1.weight"], ["0.weight", "2.weight", "4.weight"]),
        (("[01].*", "2.bias"), ["2.weight", "4.weight", "4.bias"]),
    ],
)
def test_excluded_parameters_are_neither_scored_nor_masked(exclude: Any, left: list[str]) -> None:
    model = small_net()
    forget = fishers(model, 0)
    mask = fisher_mask_(model, forget, ratio=0.5, exclude=exclude)
    assert list(mask.counts) == left
    scores = [forget[name] for name in left]
    expected = stable_sort_masks(scores, sum(s.numel() for s in scores) // 2)
    assert_same_masks(list(mask.as_dict().values()), expected)
    assert list(random_mask_(model, ratio=0.5, exclude=exclude).counts) == left


def test_a_name_with_pattern_characters_excludes_itself() -> None:
    model = nn.ParameterDict({"a[0]": torch.ones(2), "b": torch.ones(2)})
    assert list(random_mask_(model, ratio=1, exclude=["a[0]"]).counts) == ["b"]


def test_a_bad_score_in_an_excluded_parameter_does_not_matter() -> None:
    model = small_net()
    forget = fishers(model, 0)
    forget["4.bias"][0] = math.nan
    assert fisher_mask_(model, forget, ratio=0.5, exclude=["4.bias"]).k > 0


# Kernels.


def kernel_reference(scores: Mapping[str, Tensor], ratio: Fraction) -> dict[str, Tensor]:
    """Plain Python: list the units with their mean scores, sort them, mask the first k."""
    units = []
    for name, score in scores.items():
        if score.dim() < 2:
            continue
        for o in range(score.shape[0]):
            for i in range(score.shape[1]):
                values = score[o, i].reshape(-1).tolist()
                total = 0.0
                for value in values:
                    total += value
                units.append((total / len(values), name, o, i))
    k = math.floor(ratio * len(units))
    masks = {n: torch.zeros(s.shape, dtype=torch.bool) for n, s in scores.items() if s.dim() >= 2}
    for _, name, o, i in sorted(units, key=lambda unit: -unit[0])[:k]:
        masks[name][o, i] = True
    return masks


@pytest.mark.parametrize("levels", [None, 3], ids=["random", "tied"])
@pytest.mark.parametrize("ratio", ["0.05", "0.3", "0.77"])
def test_kernels_are_masked_whole_by_their_mean(ratio: str, levels: int | None) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, (1, 5), groups=2),
        nn.Conv3d(2, 3, 2), nn.ConvTranspose1d(4, 3, 3), nn.Linear(11, 5),
    )  # fmt: skip
    forget, remain = fishers(model, 1), fishers(model, 2)
    if levels:
        for name in forget:
            forget[name] = (forget[name] * levels).round()
            remain[name] = (remain[name] * levels).round()
    scores = {name: forget[name] - remain[name] * 0.5 for name in forget}
    expected = kernel_reference(scores, Fraction(ratio))
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}

    mask = fisher_mask_(
        model, forget, remain, ratio=float(ratio), remain_weight=0.5, granularity="kernel"
    )

    got = mask.as_dict()
    assert list(got) == list(expected)
    for name, chosen in expected.items():
        assert torch.equal(got[name], chosen)
        assert mask.counts[name] == int(
            chosen.flatten(2).any(2).sum() if chosen.dim() > 2 else chosen.sum()
        )
    assert mask.k == sum(mask.counts.values())
    assert mask.zeroed == sum(int(m.sum()) for m in expected.values())
    assert mask.units == 24 + 6 * 4 + 6 + 12 + 55
    for name, p in model.named_parameters():
        chosen = expected.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.equal(bits(p), bits(originals[name].masked_fill(chosen, 0.0)))


def test_the_kernel_mean_is_taken_in_float64() -> None:
    model = nn.Conv1d(2, 1, 3, bias=False)
    forget = {"weight": torch.tensor([[[1.0, 0.0, 0.0], [1.0, 2.0**-25, 2.0**-25]]])}
    mask = fisher_mask_(model, forget, ratio=0.5, granularity="kernel")
    assert mask.as_dict()["weight"].any(2).tolist() == [[False, True]]
    assert mask.threshold == (1 + 2.0**-24) / 3


def test_a_kernel_mean_that_overflows_is_not_finite() -> None:
    model = nn.Conv1d(1, 1, 2, bias=False).double()
    before = snapshot(model)
    forget = {"weight": torch.full((1, 1, 2), 1.5e308, dtype=torch.float64)}
    with pytest.raises(ValueError, match="'weight'"):
        fisher_mask_(model, forget, ratio=1, granularity="kernel")
    assert same(snapshot(model), before)


# Errors come before anything is modified.


Arguments = dict[str, Any]


def without(values: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if key != name}


def poisoned(values: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    tensor = values[name].clone()
    tensor.view(-1)[-1] = value
    return {**values, name: tensor}


class Reduced(dict[str, Tensor]):
    """A Fisher that knows its reduction."""

    def __init__(self, values: dict[str, Tensor], reduction: str) -> None:
        super().__init__(values)
        self.reduction = reduction


Fisher = dict[str, Tensor]
Case = tuple[type[Exception], str, Callable[[Fisher], Arguments]]


def forget_as(
    change: Callable[[Fisher], object], **others: object
) -> Callable[[Fisher], Arguments]:
    return lambda f: {"forget": change(f), **others}


def remain_as(
    change: Callable[[Fisher], object], **others: object
) -> Callable[[Fisher], Arguments]:
    return lambda f: {"remain": change(f), **others}


def plain(**arguments: object) -> Callable[[Fisher], Arguments]:
    return lambda _: arguments


def with_bias(value: object) -> Callable[[Fisher], object]:
    return lambda f: {**f, "4.bias": value}


def last(name: str, value: float) -> Callable[[Fisher], object]:
    return lambda f: poisoned(f, name, value)


ERRORS: dict[str, Case] = {
    "nan in forget": (ValueError, r"'4\.bias' is NaN", forget_as(last("4.bias", math.nan))),
    "inf in forget": (ValueError, r"'0\.bias' is NaN or inf", forget_as(last("0.bias", math.inf))),
    "nan in remain": (ValueError, r"'4\.bias' is NaN", remain_as(last("4.bias", math.nan))),
    "-inf in remain": (
        ValueError,
        r"'2\.bias' is NaN or inf",
        remain_as(last("2.bias", -math.inf)),
    ),
    "w makes inf": (ValueError, r"'0\.weight' is NaN", remain_as(dict, remain_weight=1e300)),
    "nan kernel": (
        ValueError,
        r"'2\.weight' is NaN",
        forget_as(last("2.weight", math.nan), granularity="kernel"),
    ),
    "unknown in forget": (
        ValueError,
        "forget has 'x', which is no parameter",
        forget_as(lambda f: {**f, "x": torch.ones(1)}),
    ),
    "unknown in remain": (
        ValueError,
        "remain has 'x', which is no parameter",
        remain_as(lambda f: {**f, "x": torch.ones(1)}),
    ),
    "forget lacks": (
        ValueError,
        r"remain has parameter '4\.bias', forget does not",
        lambda f: {"forget": without(f, "4.bias"), "remain": f},
    ),
    "remain lacks": (
        ValueError,
        r"forget has parameter '4\.bias', remain does not",
        remain_as(lambda f: without(f, "4.bias")),
    ),
    "forget shape": (
        ValueError,
        r"forget\['4\.bias'\] has shape \(6, 1\)",
        forget_as(with_bias(torch.ones(6, 1))),
    ),
    "remain shape": (
        ValueError,
        r"remain\['4\.bias'\] has shape \(1,\)",
        remain_as(with_bias(torch.ones(1))),
    ),
    "remain dtype": (
        ValueError,
        r"remain\['4\.bias'\] is torch\.float64",
        remain_as(with_bias(torch.ones(6).double())),
    ),
    "integers": (TypeError, r"forget\['4\.bias'\]", forget_as(with_bias(torch.ones(6).long()))),
    "not a tensor": (TypeError, r"remain\['4\.bias'\]", remain_as(with_bias(1.0))),
    "not a mapping": (TypeError, "forget must map", forget_as(lambda f: list(f.values()))),
    "reductions": (
        ValueError,
        "remain has reduction 'sum', forget has 'mean'",
        lambda f: {"forget": Reduced(f, "mean"), "remain": Reduced(f, "sum")},
    ),
    "ratio below": (ValueError, "ratio must", plain(ratio=-1e-9)),
    "ratio above": (ValueError, "ratio must", plain(ratio=math.nextafter(1, 2))),
    "ratio nan": (ValueError, "ratio must", plain(ratio=math.nan)),
    "ratio text": (ValueError, "ratio must", plain(ratio="0.5")),
    "ratio bool": (ValueError, "ratio must", plain(ratio=True)),
    "weight below": (ValueError, "remain_weight must", remain_as(dict, remain_weight=-1.0)),
    "weight inf": (ValueError, "remain_weight must", remain_as(dict, remain_weight=math.inf)),
    "weight nan": (ValueError, "remain_weight must", plain(remain_weight=math.nan)),
    "weight huge": (ValueError, "remain_weight must", plain(remain_weight=10**400)),
    "weight text": (ValueError, "remain_weight must", remain_as(dict, remain_weight="auto")),
    "granularity": (ValueError, "granularity must", plain(granularity="channel")),
    "idle pattern": (ValueError, r"exclude has 'fc\.\*'", plain(exclude=["4.*", "fc.*"])),
    "pattern string": (TypeError, "exclude must", plain(exclude="4.*")),
    "all excluded": (ValueError, "left to score", plain(exclude=["*"])),
    "empty fisher": (ValueError, "left to score", plain(forget={})),
    "no kernels": (
        ValueError,
        "left to score",
        forget_as(lambda f: {"4.bias": f["4.bias"]}, granularity="kernel"),
    ),
}
RANDOM_ERRORS = [
    name for name in ERRORS if name.split()[0] in ("ratio", "granularity", "idle", "all")
]


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_refused_and_modifies_nothing(case: str) -> None:
    error, message, arguments = ERRORS[case]
    model = small_net()
    before = snapshot(model)
    values = fishers(model, 0)
    with pytest.raises(error, match=message):
        fisher_mask_(**{"model": model, "forget": values, "ratio": 0.5, **arguments(values)})
    assert same(snapshot(model), before)


@pytest.mark.parametrize("case", RANDOM_ERRORS)
def test_bad_input_to_the_random_mask_is_refused(case: str) -> None:
    error, message, arguments = ERRORS[case]
    model = small_net()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        random_mask_(**{"model": model, "ratio": 0.5, **arguments({})})
    assert same(snapshot(model), before)


def test_a_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="model"):
        fisher_mask_({}, {}, ratio=0.5)  # type: ignore[arg-type]


def test_reductions_are_compared_only_where_both_are_known() -> None:
    model = small_net()
    values = fishers(model, 0)
    fisher_mask_(model, Reduced(values, "mean"), Reduced(values, "mean"), ratio=0.1)
    fisher_mask_(model, values, Reduced(values, "mean"), ratio=0.1)


# Parameters that are one, or share memory.


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


def test_tied_parameters_count_once_under_their_first_name() -> None:
    model = Tied()
    forget = fishers(model, 4)
    assert "head.weight" not in forget
    expected = list(fisher_mask_(Tied(), forget, ratio=0.5).as_dict().values())
    second = {("head.weight" if n == "embedding.weight" else n): f for n, f in forget.items()}
    for fisher in (forget, second, {**second, **forget}):
        model = Tied()
        mask = fisher_mask_(model, fisher, ratio=0.5)
        assert list(mask.counts) == [
            "embedding.weight",
            "middle.weight",
            "middle.bias",
            "head.bias",
        ]
        assert mask.units == 15 + 9 + 3 + 5
        assert_same_masks(list(mask.as_dict().values()), expected)


def test_excluding_either_name_excludes_a_tied_parameter() -> None:
    for name in ("head.weight", "embedding.weight"):
        model = Tied()
        mask = fisher_mask_(model, fishers(model, 4), ratio=1, exclude=[name])
        assert "embedding.weight" not in mask.counts and model.head.weight.any()


def test_two_names_of_one_parameter_with_two_values_are_refused() -> None:
    model = Tied()
    before = snapshot(model)
    forget = fishers(model, 4)
    with pytest.raises(ValueError, match=r"'embedding\.weight' and 'head\.weight'"):
        fisher_mask_(model, {**forget, "head.weight": torch.ones(5, 3)}, ratio=0.5)
    assert same(snapshot(model), before)


def views(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> nn.Module:
    buffer = torch.arange(1.0, 25.0)
    model = nn.Module()
    model.a = nn.Parameter(first(buffer))
    model.between = nn.Parameter(torch.ones(2))
    model.b = nn.Parameter(second(buffer))
    return model


OVERLAPS = {
    "the same": views(lambda t: t, lambda t: t),
    "one element": views(lambda t: t[:9], lambda t: t[8:]),
    "a transpose": views(lambda t: t.view(4, 6), lambda t: t.view(4, 6).t()),
    "another dtype": views(lambda t: t.view(torch.float16)[7:9], lambda t: t[4:6]),
    "across columns": views(lambda t: t.view(4, 6)[:, :3], lambda t: t.view(4, 6)[:, 2:]),
}
DISJOINT = {
    "neighbours": views(lambda t: t[:9], lambda t: t[9:]),
    "columns": views(lambda t: t.view(4, 6)[:, :3], lambda t: t.view(4, 6)[:, 3:]),
    "even and odd": views(lambda t: t[::2], lambda t: t[1::2]),
    "another dtype": views(lambda t: t.view(torch.float16)[6:8], lambda t: t[4:6]),
}


@pytest.mark.parametrize("case", OVERLAPS)
@pytest.mark.parametrize("exclude", [(), ("a",), ("b",)])
def test_parameters_that_share_memory_are_refused(case: str, exclude: tuple[str, ...]) -> None:
    model = OVERLAPS[case]
    before = snapshot(model)
    for call in (
        lambda: fisher_mask_(model, fishers(model, 0), ratio=0.5, exclude=exclude),
        lambda: random_mask_(model, ratio=0.5, exclude=exclude),
    ):
        with pytest.raises(ValueError, match=r"'(a' and 'b|b' and 'a)' share memory"):
            call()
    assert same(snapshot(model), before)
    # Neither is written to: nothing to refuse.
    fisher_mask_(model, fishers(model, 0), ratio=0, exclude=("a", "b"))


def test_overlapping_memory_of_two_storages_is_seen() -> None:
    array = torch.ones(6).numpy()
    model = nn.Module()
    model.a = nn.Parameter(torch.from_numpy(array[:4]))
    model.b = nn.Parameter(torch.from_numpy(array[3:]))
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        random_mask_(model, ratio=0.5)


@pytest.mark.parametrize("case", DISJOINT)
def test_disjoint_views_of_one_storage_are_masked(case: str) -> None:
    model = DISJOINT[case]
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = fisher_mask_(model, fishers(model, 0), ratio=0.4)
    for name, p in model.named_parameters():
        expected = originals[name].masked_fill(mask.as_dict()[name], 0.0)
        assert torch.equal(bits(p), bits(expected))
    mask.undo_(model)
    for name, p in model.named_parameters():
        assert torch.equal(bits(p), bits(originals[name]))


def test_a_parameter_whose_elements_share_memory_is_refused() -> None:
    for tensor in (torch.ones(1).expand(4), torch.ones(9).as_strided((3, 3), (2, 1))):
        model = nn.Module()
        model.a = nn.Parameter(tensor)
        with pytest.raises(ValueError, match="'a' share memory with each other"):
            random_mask_(model, ratio=0.5)


def test_parameters_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(ValueError, match="'weight' cannot be masked"):
        random_mask_(nn.Linear(2, 2, device="meta"), ratio=0.5)
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'weight' cannot be masked"):
        fisher_mask_(model, {"weight": torch.ones(2, 2)}, ratio=0.5)


# Shapes and strides of parameters.


def test_non_contiguous_and_odd_parameters() -> None:
    torch.manual_seed(3)
    model = nn.Module()
    model.columns = nn.Parameter(torch.randn(6, 4).t())
    model.strided = nn.Parameter(torch.randn(5, 8)[:, ::2])
    model.channels_last = nn.Parameter(
        torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    )
    model.scalar = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    addresses = {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()}
    forget = fishers(model, 1)
    for granularity in ("parameter", "kernel"):
        mask = fisher_mask_(model, forget, ratio=0.6, granularity=granularity)
        if granularity == "parameter":
            names = [n for n in forget if n != "empty"]
            total = sum(forget[n].numel() for n in names)
            expected = stable_sort_masks([forget[n] for n in names], total * 6 // 10)
            assert_same_masks(list(mask.as_dict().values()), expected)
        masks = mask.as_dict()
        for name, p in model.named_parameters():
            chosen = masks.get(name, torch.zeros(p.shape, dtype=torch.bool))
            assert torch.equal(bits(p), bits(originals[name].masked_fill(chosen, 0.0)))
            assert (p.data_ptr(), p.stride()) == addresses[name]
        mask.undo_(model)
        for name, p in model.named_parameters():
            assert torch.equal(bits(p), bits(originals[name]))


def test_a_scalar_parameter_is_masked_and_restored() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(-3.0))
    mask = fisher_mask_(model, {"scale": torch.tensor(1.0)}, ratio=1)
    assert model.scale.item() == 0.0
    mask.undo_(model)
    assert model.scale.item() == -3.0


# The random mask.


def test_random_mask_is_uniform_over_the_units() -> None:
    draws, ratio = 3000, 0.3
    seen = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(1, 4, bias=False))
        mask = random_mask_(model, ratio=ratio, generator=generator)
        assert (mask.k, mask.units) == (3, 10)
        seen += torch.cat([m.reshape(-1) for m in mask.as_dict().values()])
    deviation = (seen - draws * ratio).abs().max() / math.sqrt(draws * ratio * (1 - ratio))
    assert deviation < 4


def test_random_mask_covers_what_requires_grad_and_follows_its_generator() -> None:
    masks = []
    for seed in (1, 1, 2):
        model = small_net()
        model.get_parameter("0.weight").requires_grad_(False)
        before = bits(model.get_parameter("0.weight")).clone()
        generator = torch.Generator().manual_seed(seed)
        mask = random_mask_(model, ratio=0.5, generator=generator, granularity="kernel")
        assert list(mask.counts) == ["2.weight", "4.weight"]
        assert (mask.k, mask.units) == (31, 62)
        assert mask.threshold is None and mask.remain_weight is None
        assert torch.equal(bits(model.get_parameter("0.weight")), before)
        kernels = mask.as_dict()["2.weight"]
        assert torch.equal(kernels.any(2), kernels.all(2))
        for name, chosen in mask.as_dict().items():
            assert torch.equal(model.get_parameter(name) == 0, chosen)
        masks.append(torch.cat([m.reshape(-1) for m in mask.as_dict().values()]))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


# Undo, apply, save and load.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0])
def test_undo_restores_every_bit(
    dtype: torch.dtype, saved: bool, ratio: float, tmp_path: Path
) -> None:
    model = small_net().to(dtype)
    with torch.no_grad():
        model.get_parameter("4.weight")[0, :4] = torch.tensor([-0.0, math.nan, math.inf, 1e-45])
        model.get_parameter("4.bias").view(
            {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        )[0] = -1
    original = [b[0] for b in snapshot(model)]
    mask = fisher_mask_(model, fishers(model, 9, torch.float32), ratio=ratio)
    masked = [b[0] for b in snapshot(model)]
    assert any(not torch.equal(a, b) for a, b in zip(original, masked, strict=True))
    if saved:
        mask.save(tmp_path / "mask.safetensors")
        mask = Mask.load(tmp_path / "mask.safetensors")
    versions = [p._version for p in model.parameters()]
    mask.undo_(model)
    assert all(torch.equal(a, b[0]) for a, b in zip(original, snapshot(model), strict=True))
    for p, version, count in zip(model.parameters(), versions, mask.counts.values(), strict=True):
        assert (p._version > version) == bool(count)
    mask.apply_(model)
    assert all(torch.equal(a, b[0]) for a, b in zip(masked, snapshot(model), strict=True))


def test_apply_masks_another_copy_of_the_model() -> None:
    model, copy = small_net(), small_net().double()
    mask = fisher_mask_(model, fishers(model, 0), ratio=0.5)
    mask.apply_(copy)
    for name, chosen in mask.as_dict().items():
        assert not copy.get_parameter(name)[chosen].any()
    assert torch.equal(
        bits(model.get_parameter("0.weight")), bits(copy.get_parameter("0.weight").float())
    )


def renamed() -> nn.Module:
    model = small_net()
    return nn.Sequential(*[model[i] for i in range(4)])


def reshaped() -> nn.Module:
    model = small_net()
    model[4] = nn.Linear(6, 7)
    return model


def newly_tied() -> nn.Module:
    model = small_net()
    model[1].bias = model[0].bias
    return model


def newly_shared() -> nn.Module:
    model = small_net()
    model[1].bias = nn.Parameter(model.get_parameter("0.bias").detach())
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (renamed, r"no parameter '4\.weight'"),
        (reshaped, r"'4\.weight' has shape \(7, 6\)"),
        (newly_tied, r"'0\.bias' and '1\.bias'"),
        (newly_shared, r"'0\.bias' and '1\.bias' share memory"),
    ],
)
def test_undo_and_apply_check_the_model_first(other: Callable[[], nn.Module], message: str) -> None:
    source = small_net()
    mask = fisher_mask_(source, fishers(source, 0), ratio=0.5)
    model = other()
    before = snapshot(model)
    for change in (mask.apply_, mask.undo_):
        with pytest.raises(ValueError, match=message):
            change(model)
    assert same(snapshot(model), before)


def test_undo_refuses_another_dtype() -> None:
    model = small_net()
    mask = fisher_mask_(model, fishers(model, 0), ratio=0.5)
    model[4].double()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'4\.weight' is torch.float64"):
        mask.undo_(model)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("granularity", ["parameter", "kernel"])
@pytest.mark.parametrize("ratio", [0.0, 0.004, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["fisher", "forget only", "random"])
def test_save_and_load_give_the_same_mask(
    kind: str, ratio: float, granularity: masking.Granularity, tmp_path: Path
) -> None:
    model = nn.Sequential(small_net(), nn.Linear(40, 40))
    if kind == "random":
        mask = random_mask_(model, ratio=ratio, granularity=granularity)
    else:
        remain = fishers(model, 1) if kind == "fisher" else None
        mask = fisher_mask_(
            model,
            fishers(model, 0),
            remain,
            ratio=ratio,
            granularity=granularity,
            remain_weight=0.1,
        )
    path = tmp_path / "mask.safetensors"
    path.write_bytes(b"older content")
    mask.save(path)
    assert os.listdir(tmp_path) == ["mask.safetensors"]
    loaded = Mask.load(str(path))
    for name in ("k", "units", "zeroed", "counts", "ratio", "granularity", "threshold"):
        assert getattr(loaded, name) == getattr(mask, name)
    assert loaded.remain_weight == mask.remain_weight == (0.1 if kind == "fisher" else None)
    assert repr(loaded) == repr(mask)
    assert list(loaded.as_dict()) == list(mask.as_dict())
    for ours, theirs in zip(loaded.as_dict().values(), mask.as_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_file_holds_the_smaller_of_bits_and_indices(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    for ratio, dtype, size in ((0.03, torch.int32, 30), (0.04, torch.uint8, 125)):
        random_mask_(nn.Linear(1000, 1, bias=False), ratio=ratio).save(path)
        code = load_file(path)["mask:weight"]
        assert (code.dtype, code.numel()) == (dtype, size)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.safetensors"
    path.write_bytes(b"older content")
    mask = random_mask_(small_net(), ratio=0.1)

    def fail(tensors: object, name: Path, metadata: object) -> None:
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(masking, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        mask.save(path)
    assert path.read_bytes() == b"older content"
    assert os.listdir(tmp_path) == ["mask.safetensors"]


def test_loading_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Mask.load(tmp_path / "none.safetensors")


File = SimpleNamespace  # fields: the JSON; header: what overrides the header; tensors
Change = Callable[[File], object]


def edit(part: str, key: str, value: object) -> Change:
    return lambda file: getattr(file, part).__setitem__(key, value)


def reshape(name: str, *shape: object) -> Change:
    return lambda file: file.fields["shapes"].__setitem__(name, list(shape))


def text(field: str, value: str) -> Change:
    """Set a field of the JSON to what ``json.dumps`` would not write."""

    def change(file: File) -> None:
        file.fields[field] = "MARK"
        file.header["mask"] = json.dumps(file.fields).replace('"MARK"', value)

    return change


MALFORMED: dict[str, tuple[str, Change]] = {
    "format": ("header does not say", edit("header", "format", "fastfisher.fisher")),
    "later version": (r"of version '4', this fastfisher reads", edit("header", "version", "4")),
    "no version": ("of version None", lambda file: file.header.pop("version")),
    "no groups": ("does not have the fields", lambda file: file.fields.pop("groups")),
    "not JSON": ("Expecting", edit("header", "mask", "{")),
    "deep JSON": ("recursion", edit("header", "mask", "[" * 100_000)),
    "no object": ("does not have the fields", edit("header", "mask", "[]")),
    "a field too many": ("does not have the fields", edit("fields", "extra", 1)),
    "a field too few": ("does not have the fields", lambda file: file.fields.pop("ratio")),
    "ratio": ("ratio must", edit("fields", "ratio", 1.5)),
    "another ratio": ("49 of 2578 units is not the ratio 0.3", edit("fields", "ratio", 0.3)),
    "granularity": ("granularity must", edit("fields", "granularity", ["kernel"])),
    "weight": ("remain_weight must", edit("fields", "remain_weight", "1")),
    "threshold": ("threshold must", edit("fields", "threshold", True)),
    "nan": ("NaN is not a number", text("threshold", "NaN")),
    "infinity": ("-Infinity is not a number", text("threshold", "-Infinity")),
    "overflow": ("threshold must", text("threshold", "1e999")),
    "shapes": ("shapes must map", edit("fields", "shapes", [])),
    "size of text": ("shapes must map", reshape("dense", 8, "9")),
    "negative sizes": ("shapes must map", reshape("dense", -8, -9)),
    "no elements": ("shapes must map", reshape("conv", 2, 3, 0)),
    "size over int64": ("shapes must map", reshape("sparse", 2**70, 1)),
    "product over int64": ("is not the ratio", reshape("sparse", 2**62, 2**62)),
    "no kernels": ("'dense' has no kernels", reshape("dense", 72)),
    "a name too many": ("tensors are not those", reshape("more", 1, 1)),
    "a tensor too few": ("tensors are not those", lambda file: file.tensors.pop("values:dense")),
    "a tensor too many": ("tensors are not those", edit("tensors", "bias", torch.ones(1))),
    "values": ("5 values for 40", edit("tensors", "values:dense", torch.ones(5))),
    "flat values": ("not flat", edit("tensors", "values:dense", torch.ones(1, 40))),
    "flat mask": ("not flat", edit("tensors", "mask:dense", torch.ones(1, 9).byte())),
    "bits too few": ("one bit per", edit("tensors", "mask:dense", torch.zeros(8).byte())),
    "bits": ("40 values for 32", lambda file: file.tensors["mask:dense"].bitwise_not_()),
    "bits after the end": ("beyond", lambda file: file.tensors["mask:conv"][-1].bitwise_or_(128)),
    "float mask": ("dtype torch.float32", edit("tensors", "mask:dense", torch.zeros(9))),
    "index too large": ("not ascending", lambda file: file.tensors["mask:sparse"][-1].fill_(2500)),
    "negative index": ("not ascending", lambda file: file.tensors["mask:sparse"][0].fill_(-1)),
    "repeated index": ("not ascending", lambda file: file.tensors["mask:sparse"].fill_(5)),
    "shifted kernel": (
        "splits a unit",
        edit("tensors", "mask:conv", torch.tensor([0b111110, 0, 0, 0], dtype=torch.uint8)),
    ),
    "scattered kernel": (
        "splits a unit",
        edit("tensors", "mask:conv", torch.tensor([0b101111, 0, 0, 0], dtype=torch.uint8)),
    ),
    "half a kernel": (
        "splits a unit",
        lambda file: file.tensors.update(
            {
                "mask:conv": torch.tensor([0b111, 0, 0, 0], dtype=torch.uint8),
                "values:conv": torch.ones(3),
            }
        ),
    ),
}


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mask with bits ("dense"), indices ("sparse") and one masked kernel ("conv")."""
    torch.manual_seed(0)
    model = nn.Module()
    model.conv = nn.Parameter(torch.randn(2, 3, 5))  # 30 elements: the last byte is not full
    model.dense = nn.Parameter(torch.randn(8, 9))
    model.sparse = nn.Parameter(torch.randn(50, 50))
    forget = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    forget["conv"][0, 0] = 1
    forget["dense"][:, ::2] = 1
    forget["sparse"][::7, 3] = 1
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    k = 1 + 40 + 8
    mask = fisher_mask_(model, forget, ratio=k / (6 + 72 + 2500), granularity="kernel")
    assert mask.counts == {"conv": 1, "dense": 40, "sparse": 8}
    mask.save(path)
    return path


def unpack(path: Path) -> File:
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    return File(fields=json.loads(header.pop("mask")), header=header, tensors=load_file(path))


def pack(file: File, path: Path) -> None:
    save_file(file.tensors, path, {"mask": json.dumps(file.fields), **file.header})


def test_the_file_that_the_malformed_ones_come_from_loads(valid_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    pack(unpack(valid_file), path)
    assert Mask.load(path).k == 49
    dtypes = {n: t.dtype for n, t in load_file(path).items() if n.startswith("mask:")}
    assert dtypes == {
        "mask:conv": torch.uint8,
        "mask:dense": torch.uint8,
        "mask:sparse": torch.int32,
    }


def test_a_file_of_an_earlier_version_loads(valid_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "first.safetensors"
    file = unpack(valid_file)
    assert file.header["version"] == "3"
    file.header["version"] = "2"
    pack(file, path)
    assert repr(Mask.load(path)) == repr(Mask.load(valid_file))
    file.header["version"] = "1"
    pack(file, path)
    assert Mask.load(path).groups == (("conv", "dense", "sparse"),)
    del file.fields["groups"]  # as the first such files are
    pack(file, path)
    first, now = Mask.load(path), Mask.load(valid_file)
    assert first.groups == now.groups and repr(first) == repr(now)
    assert all(torch.equal(mask, now.as_dict()[name]) for name, mask in first.as_dict().items())
    file.fields["shapes"] = 5
    pack(file, path)
    with pytest.raises(ValueError, match="shapes must map"):
        Mask.load(path)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused(case: str, valid_file: Path, tmp_path: Path) -> None:
    message, change = MALFORMED[case]
    file = unpack(valid_file)
    change(file)
    path = tmp_path / "bad.safetensors"
    pack(file, path)
    with pytest.raises(
        ValueError, match=rf"bad\.safetensors is not a valid mask file: .*{message}"
    ):
        Mask.load(path)


def test_a_threshold_on_an_empty_mask_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    random_mask_(small_net(), ratio=0).save(path)
    file = unpack(path)
    file.fields["threshold"] = 0.5
    pack(file, path)
    with pytest.raises(ValueError, match="empty mask"):
        Mask.load(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x00" * 64])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a valid mask file"):
        Mask.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a valid mask file"):
        Mask.load(path)


def test_a_truncated_file_is_refused(valid_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(valid_file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a valid mask file"):
        Mask.load(path)
