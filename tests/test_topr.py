"""The top-R operators give the selection of a stable sort, bit for bit, however they run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastfisher import backends, masking, ops, topr
from fastfisher.masking import Mask, fisher_mask_, plan_masks, select_top

OPS = torch.ops.fastfisher
ISAS = ops.build_info()["supported_cpu_isas"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHT = 0.37
compiled = pytest.mark.skipif(not ISAS, reason="no compiled module")


@pytest.fixture(params=[*ISAS, *["dispatcher"][: len(ISAS)], "plain torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, then torch's dispatcher, then no compiled module."""
    if request.param == "dispatcher":
        monkeypatch.setattr(topr, "_direct", lambda *_: None)
    if request.param == "dispatcher":
        yield request.param
        return
    if request.param == "plain torch":
        with backends.backend("torch"):
            yield request.param
        return
    from fastfisher import _C

    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


def values(kind: str, size: int, dtype: torch.dtype) -> Tensor:
    noise = torch.randn(size, dtype=torch.float64)
    limits = torch.finfo(dtype)
    special = noise.clone()
    special[::7], special[3::11], special[5::13] = math.nan, math.inf, -math.inf
    return {
        "random": lambda: noise,
        "sorted": lambda: noise.sort().values,
        "all equal": lambda: torch.full_like(noise, 0.25),
        "heavily tied": lambda: noise.round(),
        "mostly zero": lambda: noise.where(noise > 1.5, noise.sign() * 0.0),
        "wide": lambda: (noise * 10).exp(),
        "denormal": lambda: (noise * 3).round() * limits.smallest_normal * limits.eps,
        "nan and inf": lambda: special,
    }[kind]().to(dtype)


KINDS = [
    "random",
    "sorted",
    "all equal",
    "heavily tied",
    "mostly zero",
    "wide",
    "denormal",
    "nan and inf",
]


def difference(scores: Sequence[Tensor], remain: Sequence[Tensor]) -> list[Tensor]:
    if not remain:
        return list(scores)
    return [s - r * WEIGHT for s, r in zip(scores, remain, strict=True)]


def stable_order(scores: Sequence[Tensor]) -> Tensor:
    """Positions over all tensors, best first, by one stable sort."""
    flat = torch.cat([s.reshape(-1).double() for s in scores])
    # torch.sort puts NaN first; here it is below -inf.
    rank = flat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    order = torch.sort(rank, descending=True, stable=True).indices
    return torch.cat([order[~flat[order].isnan()], order[flat[order].isnan()].sort().values])


def zero(
    parameters: Sequence[Tensor],
    scores: Sequence[Tensor],
    k: int,
    remain: Sequence[Tensor] = (),
    record: bool = False,
) -> list[topr.Zeroed]:
    [chosen] = topr.select_top(scores, [k], remain=remain, weight=WEIGHT).rows()
    return topr.zero_selected_(
        parameters, scores, chosen, remain=remain, weight=WEIGHT, record=record
    )


def chosen_by(found: topr.Selection, scores: list[Tensor], remain: list[Tensor]) -> list[Tensor]:
    """The positions that each count selects, by zeroing ones."""
    positions = []
    for chosen in found.rows():
        ones = [torch.ones(s.shape, dtype=torch.uint8) for s in scores]
        topr.zero_selected_(ones, scores, chosen, remain=remain, weight=WEIGHT)
        positions.append((torch.cat([o.reshape(-1) for o in ones]) == 0).nonzero()[:, 0])
    return positions


# The selection.


PAIRED = ["random", "denormal", "nan and inf"]


@pytest.mark.parametrize("dtypes", [[d] for d in FLOATS] + [FLOATS], ids=str)
@pytest.mark.parametrize(
    ("kind", "paired"), [(k, False) for k in KINDS] + [(k, True) for k in PAIRED]
)
def test_every_kernel_equals_a_stable_sort(
    kind: str, dtypes: list[torch.dtype], paired: bool, kernels: str
) -> None:
    # More than is collected without a sample; none is a multiple of a vector.
    sizes = [5, 0, 2 * topr.CHUNK + 1, 70_003, 1, 333]
    scores = [values(kind, n, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    remain = [values("random", s.numel(), s.dtype) for s in scores] if paired else []
    ranked = difference(scores, remain)
    total = sum(sizes)
    counts = [0, 1, total // 50, total // 2, total - 1, total]
    found = topr.select_top(scores, counts, remain=remain, weight=WEIGHT)
    order = stable_order(ranked)
    flat = torch.cat([r.double() for r in ranked])
    for k, key, chosen in zip(
        counts, found.keys.tolist(), chosen_by(found, scores, remain), strict=True
    ):
        assert torch.equal(chosen, order[:k].sort().values)
        if k:
            threshold = torch.tensor(topr.value_of(key, scores), dtype=torch.float64)
            torch.testing.assert_close(
                threshold, flat[order[k - 1]], rtol=0, atol=0, equal_nan=True
            )
    assert found.selected.sum(1).tolist() == counts
    assert found.finite.tolist() == [bool(r.isfinite().all()) for r in ranked]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_difference_is_rounded_twice_in_its_dtype(dtype: torch.dtype, kernels: str) -> None:
    # A difference that is fused, or not rounded to the dtype, is nearly always another number here.
    # From the denormals to the largest numbers of float16.
    scale = 2.0 ** torch.randint(-24, 15, (40_000,))
    forget = (torch.randn(40_000, dtype=torch.float64) * scale).to(dtype)
    remain = torch.cat([forget[:-7].float().mul(2.7).to(dtype), forget[:7]])
    for weight in (WEIGHT, 1 / 3, 1.0, 0.0, 1e-3):
        ranked = forget - remain * weight
        counts = [1, 13_333, 39_995]
        found = topr.select_top([forget], counts, remain=[remain], weight=weight)
        alone = topr.select_top([ranked], counts)
        assert all(torch.equal(a, b) for a, b in zip(found[:4], alone[:4], strict=True))


def test_denormals_are_told_apart_where_the_processor_flushes_them(kernels: str) -> None:
    scores = torch.arange(100, dtype=torch.int32).view(torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        masks = [select_top([scores], k)[0] for k in (1, 40, 99)]
    finally:
        torch.set_flush_denormal(False)
    assert [mask.nonzero()[:, 0].tolist() for mask in masks] == [
        list(range(100 - k, 100)) for k in (1, 40, 99)
    ]


def test_a_sample_that_misleads_is_found_out() -> None:
    # All of one key but for a few, placed where a sample of one in 64 is unlikely to see them.
    scores = torch.zeros(300_000)
    scores[::30_011] = torch.arange(1.0, 11.0)
    scores[7::30_011] = -torch.arange(1.0, 11.0)
    order = stable_order([scores])
    for k in (1, 5, 10, 11, 150_000, len(scores) - 10, len(scores) - 9, len(scores) - 1):
        [chosen] = chosen_by(topr.select_top([scores], [k]), [scores], [])
        assert torch.equal(chosen, order[:k].sort().values)


@pytest.mark.parametrize("spread", [3, 40])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bracket_with_too_much_in_it_is_narrowed(dtype: torch.dtype, spread: int) -> None:
    # So few keys, next to one another, that each has thousands of ties.
    size = 1 << 20
    bits = torch.randint(-spread, spread + 1, (size,))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    middle = torch.tensor(0.5, dtype=dtype).view(integers)
    scores = (bits.to(integers) + middle).view(dtype)
    scores[::2] = torch.randn(size // 2, dtype=dtype)
    order = stable_order([scores])
    for k in (size // 100, size // 4, size // 2, 3 * size // 4):
        [chosen] = chosen_by(topr.select_top([scores], [k]), [scores], [])
        assert torch.equal(chosen, order[:k].sort().values)


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", ["two large", "many small"])
def test_same_bits_for_any_number_of_threads(kind: str, shapes: str) -> None:
    sizes = [200_001, 150_000] if shapes == "two large" else torch.randint(0, 500, (900,)).tolist()
    scores = [values(kind, n, torch.float32) for n in sizes]
    remain = [values("random", n, torch.float32) for n in sizes]
    counts = [1, sum(sizes) // 50, sum(sizes) // 3]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = topr.select_top(scores, counts, remain=remain, weight=WEIGHT)
            parameters = [torch.arange(1.0, n + 1) for n in sizes]
            zeroed = topr.zero_selected_(
                parameters, scores, found.rows()[1], remain=remain, weight=WEIGHT, record=True
            )
            parts = [part for z in zeroed for part in (z.code, z.values, torch.tensor(z.runs))]
            results.append([*found[:4], *chosen_by(found, scores, remain), *parameters, *parts])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@compiled
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_kernels_understand_what_the_others_selected(dtype: torch.dtype) -> None:
    scores = [values("nan and inf", 20_000, dtype), values("heavily tied", 300, dtype)]
    order = stable_order(scores)
    for k in (0, 1, 5000, 12_000, 20_300):
        plain = topr.Selection(*topr._select_top_default(scores, [], 1.0, [k]), (k,))
        fast = topr.select_top(scores, [k])
        assert torch.equal(plain.keys, fast.keys) and torch.equal(plain.selected, fast.selected)
        [chosen] = chosen_by(plain, scores, [])
        assert torch.equal(chosen, order[:k].sort().values)
        ones = [torch.ones_like(s) for s in scores]
        topr._zero_selected_default(ones, scores, [], 1.0, *fast.rows()[0], False)
        assert torch.equal((torch.cat(ones) == 0).nonzero()[:, 0], order[:k].sort().values)


# What the compiled kernels are handed without torch's dispatcher.


class Subclass(Tensor):
    pass


def odd_tensors() -> dict[str, Tensor]:
    negated = torch.complex(torch.zeros(4), torch.tensor([1.0, -3.0, -2.0, 4.0])).conj().imag
    assert negated.is_neg()
    single = torch.complex(torch.zeros(1), torch.tensor([-3.0])).conj().imag
    assert single.is_neg() and single.is_contiguous()
    return {
        "negated": negated,
        "negated, of one element": single,
        "subclass": torch.tensor([-1.0, 3.0, 2.0]).as_subclass(Subclass),
        "parameter": nn.Parameter(torch.tensor([-1.0, 3.0, 2.0])),
        "of no dimension": torch.tensor(3.0),
        "expanded": torch.tensor([3.0]).expand(2),
        "empty": torch.empty(0, 3),
    }


@pytest.mark.parametrize("name", odd_tensors())
def test_odd_tensors_are_ranked_by_what_they_say(name: str) -> None:
    scores = [odd_tensors()[name], torch.tensor([2.5, 0.0])]
    said = [torch.tensor(score.tolist()) for score in scores]
    for k in range(sum(map(torch.numel, scores)) + 1):
        order = stable_order([s.reshape(-1) for s in said])[:k].sort().values
        [chosen] = chosen_by(topr.select_top(scores, [k]), scores, [])
        assert torch.equal(chosen, order)


@compiled
@pytest.mark.parametrize("name", ["negated", "negated, of one element"])
def test_a_parameter_that_is_yet_to_be_negated_is_refused(name: str) -> None:
    parameter = odd_tensors()[name]
    before = parameter.tolist()
    with pytest.raises(RuntimeError, match="negation"):
        zero([parameter], [torch.arange(1.0, parameter.numel() + 1)], 1)
    assert parameter.tolist() == before


def test_a_parameter_of_a_subclass_is_zeroed() -> None:
    parameter = odd_tensors()["subclass"]
    [record] = zero([parameter], [torch.tensor([1.0, 2.0, 3.0])], 1, record=True)
    assert parameter.tolist() == [-1, 3, 0] and record.values.tolist() == [2]


def test_modes_see_the_operators() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        zero([torch.ones(3)], [torch.arange(3.0)], 1)
    assert OPS.select_top.default in seen and OPS.zero_selected_.default in seen


def test_compiled_code_has_the_operators() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    scores = [torch.arange(3.0)]
    keys = torch.compile(lambda: topr.select_top(scores, [1]).keys, backend=backend)()
    assert torch.equal(keys, topr.select_top(scores, [1]).keys)
    assert any(node.target is OPS.select_top.default for g in graphs for node in g.graph.nodes)


# Zeroing, and the record of it.


def expected_record(mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int]:
    flat = mask.reshape(-1)
    index = flat.nonzero()[:, 0].int()
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8).int()
    packed = (padded * 2 ** torch.arange(8)).sum(1).to(torch.uint8)
    starts = [i for i, on in enumerate(flat.tolist()) if on and not (i and flat[i - 1])]
    return index if index.nbytes < packed.nbytes else packed, values[mask], len(starts)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128]
)
def test_the_record_has_what_was_zeroed(dtype: torch.dtype, kernels: str) -> None:
    # A dense one, a sparse one, one where nothing is selected, and runs across words and chunks.
    scores = [torch.rand(301), torch.rand(20_000) - 0.96, torch.full((40,), -1.0), torch.rand(3)]
    scores.append(torch.zeros(2 * topr.CHUNK + 9))
    for start, end in ((60, 70), (topr.CHUNK - 3, topr.CHUNK + 2), (len(scores[4]) - 1, None)):
        scores[4][start:end] = 1.0
    parameters = [torch.randn(s.shape).to(dtype) for s in scores]
    originals = [p.clone() for p in parameters]
    k = sum(int((s > 0).sum()) for s in scores)
    zeroed = zero(parameters, scores, k, record=True)
    for parameter, original, score, (code, kept, runs) in zip(
        parameters, originals, scores, zeroed, strict=True
    ):
        want = expected_record(score > 0, original)
        assert code.dtype == want[0].dtype and torch.equal(code, want[0])
        assert torch.equal(kept, want[1]) and runs == want[2]
        assert torch.equal(parameter, original.masked_fill(score > 0, 0))


def test_strided_scores_and_parameters(kernels: str) -> None:
    rows, columns = shape = (310, 97)  # more than one chunk

    def strided() -> list[Tensor]:
        return [
            torch.randn(columns, rows).t(),
            torch.randn(rows, 2 * columns)[:, ::2],
            torch.randn(rows, 1).expand(shape),
            torch.randn(rows, columns + 3)[:, 3:],
        ]

    scores, remain = strided(), [t.flip(0) for t in strided()]
    scores.append(torch.randn(5, 6, 7, 8).to(memory_format=torch.channels_last))
    remain.append(torch.randn(5, 6, 7, 8))
    parameters = strided()
    parameters[2] = torch.empty_strided(shape, (1, rows)).normal_()
    parameters.append(torch.randn(5, 6, 7, 8).to(memory_format=torch.channels_last))
    originals = [p.clone() for p in parameters]
    chosen = torch.zeros(sum(s.numel() for s in scores), dtype=torch.bool)
    chosen[stable_order(difference(scores, remain))[:20_000]] = True
    zeroed = zero(parameters, scores, 20_000, remain, record=True)
    parts = chosen.split([s.numel() for s in scores])
    for parameter, original, part, record in zip(parameters, originals, parts, zeroed, strict=True):
        mask = part.view(original.shape)
        assert torch.equal(parameter, original.masked_fill(mask, 0))
        assert torch.equal(record.values, original[mask])


def test_ten_thousand_small_tensors() -> None:
    sizes = torch.randint(0, 60, (10_000,)).tolist()
    scores = list(torch.randn(sum(sizes)).split(sizes))
    parameters = [torch.ones_like(s) for s in scores]
    zero(parameters, scores, sum(sizes) // 50)
    expected = torch.ones(sum(sizes))
    expected[stable_order(scores)[: sum(sizes) // 50]] = 0
    assert torch.equal(torch.cat(parameters), expected)


def test_versions_grow_where_something_was_zeroed(kernels: str) -> None:
    parameters = [torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)]
    before = [p._version for p in parameters]
    zero(parameters, [torch.tensor([0.0, 3.0, 2.0, 0.0]), torch.zeros(4)], 2)
    assert parameters[0].tolist() == [1, 0, 0, 1] and parameters[1].tolist() == [1] * 4
    assert parameters[0]._version > before[0]
    assert parameters[1]._version == before[1]
    assert all(p.requires_grad and p.grad_fn is None for p in parameters)


# The contract of torch's operators.

SCORES = [torch.tensor([[3.0, 1.0], [2.0, 5.0]]), torch.tensor([4.0, 0.0, 4.0])]
REMAIN = [torch.ones(2, 2), torch.ones(3)]


@pytest.mark.parametrize("remain", [[], REMAIN], ids=["one", "two"])
@pytest.mark.parametrize("counts", [[], [0], [3, 7]], ids=str)
def test_opcheck_of_select_top(remain: list[Tensor], counts: list[int]) -> None:
    torch.library.opcheck(OPS.select_top.default, (SCORES, remain, 0.5, counts))


@pytest.mark.parametrize("record", [False, True])
def test_opcheck_of_zero_selected(record: bool) -> None:
    [chosen] = topr.select_top(SCORES, [3]).rows()
    parameters = [torch.ones(2, 2), torch.ones(3)]
    # Without the comparison of a traced run: bytes between the parts of the record are undefined.
    torch.library.opcheck(
        OPS.zero_selected_.default,
        (parameters, SCORES, [], 1.0, *chosen, record),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@compiled
def test_compiled_kernels_check_what_they_are_given() -> None:
    [chosen] = topr.select_top(SCORES, [3]).rows()
    good = {
        "parameters": [torch.ones(2, 2), torch.ones(3)],
        "scores": SCORES,
        "remain": [],
        "weight": 1.0,
        **chosen._asdict(),
        "record": True,
    }
    OPS.zero_selected_.default(*good.values())
    bad = {
        "parameters": [[torch.ones(2, 2)], [torch.ones(4), torch.ones(3)]],
        "scores": [[SCORES[0], SCORES[1].long()]],
        "remain": [SCORES[:1], [SCORES[0], SCORES[1].double()], [SCORES[0], SCORES[1][:1]]],
        "key": [torch.tensor(2**31), torch.tensor(-(2**31)), torch.zeros(1).long()],
        "selected": [
            torch.zeros(2),
            torch.zeros(1).long(),
            torch.tensor([2, 1]),
            torch.tensor([2, 2]),
            torch.tensor([9, 9]),
            torch.tensor([-1, 2]),
        ],
        "candidates": [torch.zeros(1).long(), torch.zeros(2), torch.zeros(2, 2).long()],
    }
    for argument, candidates in bad.items():
        for value in candidates:
            with pytest.raises(RuntimeError, match=f"fastfisher::zero_selected_: {argument}"):
                OPS.zero_selected_.default(*{**good, argument: value}.values())
    for argument, arguments in (
        ("scores", ([SCORES[0].long()], [], 1.0, [1])),
        ("remain", (SCORES, SCORES[:1], 1.0, [1])),
        ("counts", (SCORES, [], 1.0, [8])),
        ("counts", (SCORES, [], 1.0, [-1])),
    ):
        with pytest.raises(RuntimeError, match=f"fastfisher::select_top: {argument}"):
            OPS.select_top.default(*arguments)


def test_a_selection_of_other_scores_is_refused(kernels: str) -> None:
    [chosen] = topr.select_top(SCORES, [3]).rows()
    others = [-score for score in SCORES]
    with pytest.raises(RuntimeError, match="selected: expected what select_top gave"):
        topr.zero_selected_([torch.ones(2, 2), torch.ones(3)], others, chosen)


def test_bad_input_names_the_argument(kernels: str) -> None:
    chosen = topr.Chosen(torch.tensor(0), *torch.zeros(2, 2, dtype=torch.int64), 0)
    for remain in (SCORES[:1], [SCORES[0], SCORES[1].double()], [SCORES[0], SCORES[1][:1]]):
        with pytest.raises(RuntimeError, match="select_top: remain: expected"):
            topr.select_top(SCORES, [1], remain=remain)
        with pytest.raises(RuntimeError, match="zero_selected_: remain: expected"):
            topr.zero_selected_(SCORES, SCORES, chosen, remain=remain)
    for parameters in (SCORES[:1], SCORES[::-1]):
        with pytest.raises(RuntimeError, match="zero_selected_: parameters: expected"):
            topr.zero_selected_(parameters, SCORES, chosen)
    with pytest.raises(TypeError, match="floating-point"):
        topr.zero_selected_([torch.ones(1)], [torch.ones(1).long()], chosen)
    assert select_top([], 0) == []


# Scopes, and several ratios at once.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 30)
        self.block = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        self.last = nn.Linear(7, 9)


def fishers(model: nn.Module) -> dict[str, Tensor]:
    # Larger from layer to layer, so that a global choice and one within layers differ.
    return {n: torch.rand(p.shape) + i for i, (n, p) in enumerate(model.named_parameters())}


SCOPES = {
    "global": ("global", lambda name: 0),
    "layer": ("layer", lambda name: name.rpartition(".")[0]),
    "callable": (lambda name: "l" in name[:2], lambda name: "l" in name[:2]),
}


@pytest.mark.parametrize("granularity", ["parameter", "kernel"])
@pytest.mark.parametrize("scope", SCOPES)
def test_each_group_loses_its_own_ratio(
    scope: str, granularity: masking.Granularity, tmp_path: Path
) -> None:
    model = Net()
    forget, remain = fishers(model), fishers(model)
    argument, key = SCOPES[scope]
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    scored = [n for n, p in originals.items() if granularity == "parameter" or p.dim() >= 2]
    mask = fisher_mask_(model, forget, remain, ratio=0.3, scope=argument, granularity=granularity)
    groups: dict[object, list[str]] = {}
    for name in scored:
        groups.setdefault(key(name), []).append(name)
    assert mask.groups == tuple(tuple(names) for names in groups.values())
    assert list(mask.counts) == scored
    expected, thresholds = {}, []
    for names in groups.values():
        units = [masking._unit_scores(forget[n] - remain[n], granularity) for n in names]
        chosen = torch.zeros(sum(u.numel() for u in units), dtype=torch.bool)
        order = stable_order(units)[: math.floor(0.3 * len(chosen))]
        chosen[order] = True
        thresholds.append(float(torch.cat([u.reshape(-1) for u in units])[order[-1]]))
        parts = chosen.split([u.numel() for u in units])
        for name, part, unit in zip(names, parts, units, strict=True):
            shape = originals[name].shape
            expected[name] = part.view(*unit.shape, *[1] * (len(shape) - unit.dim())).expand(shape)
    assert mask.threshold == min(thresholds)
    for name, p in model.named_parameters():
        if name in expected:
            assert torch.equal(mask.as_dict()[name], expected[name])
        assert torch.equal(
            p, originals[name].masked_fill(expected.get(name, torch.tensor(False)), 0)
        )
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert loaded.groups == mask.groups and loaded.counts == mask.counts
    loaded.undo_(model)
    assert all(torch.equal(p, originals[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("scope", ["layers", None])
def test_a_scope_must_be_known(scope: object) -> None:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="scope must be"):
        fisher_mask_(model, fishers(model), ratio=0.1, scope=scope)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_bad_score_in_any_group_modifies_nothing(scope: masking.Scope) -> None:
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    forget = fishers(model)
    forget["last.bias"][3], forget["block.0.weight"][1, 1, 1, 1] = math.nan, -math.inf
    with pytest.raises(ValueError, match=r"'block\.0\.weight' is NaN or infinite"):
        fisher_mask_(model, forget, ratio=0.1, scope=scope)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("granularity", ["parameter", "kernel"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_plan_of_several_ratios_is_that_of_each(
    scope: masking.Scope, granularity: masking.Granularity
) -> None:
    model = Net()
    forget, remain = fishers(model), fishers(model)
    before = [p.detach().clone() for p in model.parameters()]
    ratios = [0.5, 0.0, 0.011, 1.0, 0.011]
    arguments = {"remain_weight": 0.6, "scope": scope, "granularity": granularity}
    plans = plan_masks(model, forget, remain, ratios=ratios, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    for ratio, plan in zip(ratios, plans, strict=True):
        mask = plan.apply_()
        masked = [p.detach().clone() for p in model.parameters()]
        mask.undo_(model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        alone = fisher_mask_(model, forget, remain, ratio=ratio, **arguments)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), masked, strict=True))
        assert (mask.ratio, mask.k, mask.threshold) == (ratio, alone.k, alone.threshold)
        alone.undo_(model)
    assert plan_masks(model, forget, ratios=[]) == []


# What the mask is kept as.


@pytest.mark.parametrize("granularity", ["parameter", "kernel"])
@pytest.mark.parametrize(("width", "form"), [(1, "indices"), (40, "runs"), (None, "bits")], ids=str)
def test_the_mask_is_kept_in_the_smallest_form(
    width: int | None, form: str, granularity: masking.Granularity, tmp_path: Path
) -> None:
    model = nn.Linear(4000, 1, bias=False)
    forget = torch.zeros(1, 4000)
    if width is None:
        forget[:, ::3] = 1
    else:
        for start in (3, 500, 3960):
            forget[:, start : start + width] = 1
    original = model.weight.detach().clone()
    mask = fisher_mask_(
        model, {"weight": forget}, ratio=int(forget.sum()) / 4000, granularity=granularity
    )
    mask.save(tmp_path / "mask.safetensors")
    for kept in (mask, Mask.load(tmp_path / "mask.safetensors")):
        code = kept._zeroed["weight"].code
        assert (code.dtype, code.numel()) == {
            "indices": (torch.int32, 3),
            "runs": (torch.int32, 6),
            "bits": (torch.uint8, 500),
        }[form]
        assert torch.equal(kept.as_dict()["weight"], forget.bool())
    if form == "runs":
        assert code.tolist() == [[3, 40], [500, 40], [3960, 40]]
    kept.undo_(model)
    assert torch.equal(model.weight, original)


@pytest.mark.parametrize(
    "code",
    [
        [[3, 0]],
        [[-1, 4]],
        [[3, 2], [5, 2]],
        [[3, 2], [4, 2]],
        [[8, 2], [3, 2]],
        [[98, 4]],
        [[3, 4, 5]],
        [[3, 2**62], [2**62 + 5, 2**62]],
    ],
    ids=str,
)
def test_malformed_runs_are_refused(code: list[list[int]]) -> None:
    zeroed = masking._Zeroed(torch.Size([100]), torch.tensor(code), torch.ones(4))
    with pytest.raises(ValueError, match="the runs of 'p' are not"):
        zeroed.check("p", 1)


def test_runs_with_another_number_of_values_are_refused() -> None:
    zeroed = masking._Zeroed(torch.Size([2**40]), torch.tensor([[3, 2**39]]), torch.ones(4))
    with pytest.raises(ValueError, match="4 values for"):
        zeroed.check("p", 1)
    masking._Zeroed(torch.Size([100]), torch.tensor([[3, 3], [9, 1]]), torch.ones(4)).check("p", 1)
