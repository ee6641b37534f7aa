"""Every definition of FisherMask zeroes what a slow reading of that definition zeroes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fastfisher.data import batches, size_of
from fastfisher.fisher_diag import fisher_diag
from fastfisher.masking import fisher_mask_
from fastfisher.unlearning import batch_mean_fisher, unlearn
from fastfisher.unlearning.scores import Scores

CLASSES = 4


def net() -> nn.Module:
    """Convolutions with and without bias, a norm, a linear layer; float64, so that nothing ties."""
    return (
        nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, bias=False),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(54, CLASSES),
        )
        .double()
        .train()
    )


def data(samples: int, *, low: int = 0, high: int = CLASSES) -> TensorDataset:
    images = torch.randn(samples, 2, 5, 5, dtype=torch.float64)
    return TensorDataset(images, torch.randint(low, high, (samples,)))


@pytest.fixture
def model() -> nn.Module:
    made = net()
    with torch.no_grad():
        made(torch.randn(64, 2, 5, 5, dtype=torch.float64) * 2 + 1)  # running statistics
    return made


@pytest.fixture
def forget() -> TensorDataset:
    return data(11, high=1)


@pytest.fixture
def remain() -> TensorDataset:
    return data(26, low=1)


def gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the mean cross entropy of a batch, in eval mode."""
    clone = copy.deepcopy(model).eval()
    F.cross_entropy(clone(inputs), targets).backward()
    return {name: p.grad for name, p in clone.named_parameters() if p.grad is not None}


def sum_of_single_samples(model: nn.Module, dataset: Dataset[Any]) -> dict[str, Tensor]:
    """Sum over samples of the squared gradient of one, with its observed label."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(size_of(dataset)):
        image, label = dataset[n]
        for name, gradient in gradients(model, image[None], label[None]).items():
            total[name] += gradient**2
    return total


def authors_fisher(model: nn.Module, dataset: Dataset[Any], batch: int) -> dict[str, Tensor]:
    """Mean over batches of the sum over classes of pbar_y times the squared batch gradient."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    starts = range(0, size_of(dataset), batch)
    for start in starts:
        part = [dataset[n] for n in range(start, min(start + batch, size_of(dataset)))]
        images = torch.stack([image for image, _ in part])
        pbar = copy.deepcopy(model).eval()(images).detach().softmax(1).mean(0)
        for y in range(CLASSES):
            labels = torch.full((len(part),), y)
            for name, gradient in gradients(model, images, labels).items():
                total[name] += pbar[y] * gradient**2
    return {name: value / len(starts) for name, value in total.items()}


def zero_top(model: nn.Module, scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The state of the model with the k units of the largest scores zeroed: one sort, one loop."""
    units = [
        (float(score), name, index)
        for name, values in scores.items()
        for index, score in enumerate(values.flatten())
    ]
    units.sort(key=lambda unit: -unit[0])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _, name, index in units[:k]:
        state[name].view(scores[name].numel(), -1)[index] = 0
    return state


def difference(f: dict[str, Tensor], r: dict[str, Tensor] | None) -> dict[str, Tensor]:
    return f if r is None else {name: f[name] - r[name] for name in f}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("with_remain", [True, False])
@pytest.mark.parametrize("ratio", [0.02, 0.25])
def test_paper_is_the_sums_of_squared_single_sample_gradients(
    model: nn.Module,
    forget: TensorDataset,
    remain: TensorDataset,
    with_remain: bool,
    ratio: float,
) -> None:
    others = remain if with_remain else None
    scores = difference(
        sum_of_single_samples(model, forget),
        sum_of_single_samples(model, remain) if with_remain else None,
    )
    k = int(ratio * sum(value.numel() for value in scores.values()))
    expected = zero_top(model, scores, k)
    result = unlearn(
        model,
        forget,
        others,
        ratio=ratio,
        epochs=0,
        batch_size=5,
        options={"definition": "paper"},
    )
    assert result.mask is not None and result.mask.k == k > 0
    assert result.mask.remain_weight == (26 / 11 if with_remain else None)
    assert_same(model, expected)


@pytest.mark.parametrize("with_remain", [True, False])
@pytest.mark.parametrize(("ratio", "batch"), [(0.02, 8), (0.25, 8), (0.25, 128)])
def test_authors_is_their_batchwise_fisher_by_kernel(
    model: nn.Module,
    forget: TensorDataset,
    remain: TensorDataset,
    with_remain: bool,
    ratio: float,
    batch: int,
) -> None:
    others = remain if with_remain else None
    scores = difference(
        authors_fisher(model, forget, batch),
        authors_fisher(model, remain, batch) if with_remain else None,
    )
    units = {
        "0.weight": scores["0.weight"].mean((2, 3)),
        "3.weight": scores["3.weight"].mean((2, 3)),
        "6.weight": scores["6.weight"],
    }
    k = int(ratio * (10 + 30 + 54 * CLASSES))
    expected = zero_top(model, units, k)
    result = unlearn(
        model,
        forget,
        others,
        ratio=ratio,
        epochs=0,
        batch_size=batch,
        options={"definition": "authors"},
    )
    assert result.mask is not None and result.mask.k == k > 0
    assert_same(model, expected)


@pytest.mark.parametrize(("ratio", "k"), [(0.29, 28), (0.009, 0), (0.0, 0), (1.0, 100)])
def test_authors_round_the_product_down_and_zero_nothing_where_that_is_nothing(
    forget: TensorDataset, remain: TensorDataset, ratio: float, k: int
) -> None:
    # 0.29 * 100 is 28.999..., of which they make 28; and of none they make all.
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 2, bias=False)).double()
    sets = [TensorDataset(s.tensors[0], s.tensors[1] % 2) for s in (forget, remain)]
    result = unlearn(model, *sets, ratio=ratio, epochs=0, options={"definition": "authors"})
    assert result.mask is not None and result.mask.k == k


def test_recommended_without_a_remain_set_is_the_forget_fisher_alone(
    model: nn.Module, forget: TensorDataset
) -> None:
    scores = sum_of_single_samples(model, forget)
    k = int(0.1 * sum(value.numel() for value in scores.values()))
    expected = zero_top(model, scores, k)
    result = unlearn(model, forget, None, ratio=0.1, epochs=0)
    assert result.mask is not None and result.mask.k == k
    assert_same(model, expected)


@pytest.mark.parametrize("kind", ["empirical", "exact", "mc"])
def test_recommended_takes_the_fisher_of_the_kind(
    model: nn.Module, forget: TensorDataset, remain: TensorDataset, kind: str, tmp_path: Path
) -> None:
    def fisher(dataset: Dataset[Any]) -> Any:
        generator = torch.Generator().manual_seed(7)
        return fisher_diag(model, batches(dataset, 8), kind=kind, generator=generator)

    masked = copy.deepcopy(model)
    fisher_mask_(masked, fisher(forget), fisher(remain), ratio=0.1, remain_weight=2.0)
    # Neither where scores are remembered nor torch's own generator makes a difference.
    for scores in (None, Scores(tmp_path), Scores(tmp_path)):
        torch.rand(1)
        own = copy.deepcopy(model)
        unlearn(
            own,
            forget,
            remain,
            ratio=0.1,
            remain_weight=2.0,
            epochs=0,
            batch_size=8,
            seed=7,
            scores=scores,
            options={"kind": kind},
        )
        assert_same(own, masked.state_dict())
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    # What "mc" remembers is that of its seed.
    scores, options = Scores(tmp_path), {"kind": kind}
    unlearn(model, forget, remain, epochs=0, batch_size=8, seed=8, scores=scores, options=options)
    assert len(list(tmp_path.glob("*.safetensors"))) == (4 if kind == "mc" else 2)


def test_definitions_and_kinds_are_different_masks(
    model: nn.Module, forget: TensorDataset, remain: TensorDataset
) -> None:
    masks = []
    for options in (
        {},
        {"kind": "exact"},
        {"kind": "mc"},
        {"definition": "paper"},
        {"definition": "authors"},
    ):
        own = copy.deepcopy(model)
        unlearn(own, forget, remain, ratio=0.1, epochs=0, options=options)
        masks.append(torch.cat([p.detach().flatten() == 0 for p in own.parameters()]))
    for i, mask in enumerate(masks):
        assert not any(torch.equal(mask, other) for other in masks[:i])


@pytest.mark.parametrize("batch", [1, 4, 11, 128])
def test_batch_mean_fisher_of_the_model_is_the_authors(
    model: nn.Module, forget: TensorDataset, batch: int
) -> None:
    expected = authors_fisher(model, forget, batch)
    found = batch_mean_fisher(model, forget, batch, "model")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=0, msg=name)
    if batch == 1:
        exact = fisher_diag(model, batches(forget, 8), kind="exact")
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-18, msg=name)


@pytest.mark.parametrize("batch", [1, 4, 128])
def test_batch_mean_fisher_of_the_observed_labels_squares_the_gradient_of_a_batch(
    model: nn.Module, remain: TensorDataset, batch: int
) -> None:
    parts = [gradients(model, *part) for part in batches(remain, batch)]
    found = batch_mean_fisher(model, remain, batch)
    for name, value in found.items():
        expected = torch.stack([part[name] ** 2 for part in parts]).mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0, msg=name)
    if batch == 1:
        for name, value in sum_of_single_samples(model, remain).items():
            torch.testing.assert_close(found[name], value / 26, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("labels", ["observed", "model"])
def test_batch_mean_fisher_leaves_the_model_as_it_was(
    model: nn.Module, forget: TensorDataset, labels: Any
) -> None:
    model[6].bias.requires_grad_(False)  # type: ignore[index]
    model[1].eval()  # type: ignore[index]
    unused = nn.ModuleList([model, nn.Linear(1, 2)])
    unused.forward = model.forward
    before = {name: value.clone() for name, value in unused.state_dict().items()}
    modes = [module.training for module in unused.modules()]
    with torch.no_grad():
        found = batch_mean_fisher(unused, forget, 8, labels)
    assert "0.6.bias" not in found and "0.6.weight" in found
    assert not found["1.weight"].any() and not found["0.0.weight"].requires_grad
    assert_same(unused, before)
    assert [module.training for module in unused.modules()] == modes
    assert all(p.grad is None for p in unused.parameters())


def test_batch_mean_fisher_adds_up_half_precision_in_float32(forget: TensorDataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, CLASSES)).bfloat16()
    halves = TensorDataset(forget.tensors[0].bfloat16(), forget.tensors[1])
    for labels in ("observed", "model"):
        found = batch_mean_fisher(model, halves, 4, labels)  # type: ignore[arg-type]
        assert {value.dtype for value in found.values()} == {torch.float32}


def test_batch_mean_fisher_rejects(model: nn.Module, forget: TensorDataset) -> None:
    with pytest.raises(ValueError, match="labels: expected one of"):
        batch_mean_fisher(model, forget, labels="true")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        batch_mean_fisher(model, forget, 0)
    with pytest.raises(ValueError, match="dataset: expected at least one sample"):
        batch_mean_fisher(model, data(0), 4)
    with pytest.raises(ValueError, match=r"model: expected outputs \[B, C\]"):
        batch_mean_fisher(nn.Conv2d(2, 2, 1).double(), forget)
    with pytest.raises(ValueError, match="model: no parameter requires grad"):
        batch_mean_fisher(model.requires_grad_(False), forget)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"options": {"definition": "golatkar"}}, ValueError, "options.definition: expected one"),
        ({"options": {"kind": "true"}}, ValueError, "options.kind: expected one"),
        (
            {"options": {"definition": "paper", "kind": "mc"}},
            ValueError,
            "options.kind: the definition 'paper' has a Fisher of its own",
        ),
        ({"options": {"search_scopes": "layer"}}, TypeError, "options.search_scopes: expected a l"),
        ({"options": {"search_scopes": []}}, ValueError, "options.search_scopes: expected some"),
        (
            {"options": {"search_granularities": ["channel"]}},
            ValueError,
            "options.search_granularities: expected some",
        ),
        ({"options": {"definition": "paper"}, "remain_weight": 2.0}, ValueError, "remain_weight:"),
        ({"options": {"definition": "authors"}, "remain_weight": "auto"}, ValueError, "remain_w"),
        ({"options": {"definition": "paper"}, "scope": "layer"}, ValueError, "scope: leave it"),
        (
            {"options": {"definition": "paper"}, "granularity": "kernel"},
            ValueError,
            "granularity: expected 'parameter'",
        ),
        ({"options": {"definition": "authors"}, "exclude": ("0.*",)}, ValueError, "exclude: leave"),
        ({"remain_set": None, "remain_weight": "auto"}, ValueError, "remain_set: expected a data"),
    ],
)
def test_contradictions_are_refused_before_anything_is_modified(
    model: nn.Module,
    forget: TensorDataset,
    remain: TensorDataset,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        unlearn(model, forget, **{"remain_set": remain, "epochs": 0, **arguments})
    assert_same(model, before)


def test_authors_need_a_layer_that_they_mask(forget: TensorDataset, remain: TensorDataset) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()).double()
    with pytest.raises(ValueError, match="model: expected a convolution or linear layer"):
        unlearn(model, forget, remain, epochs=0, options={"definition": "authors"})
