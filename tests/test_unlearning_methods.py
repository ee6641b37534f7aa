"""Each method does what its equation says, by its seed alone, and refuses what it cannot do."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fastfisher.data import batches, load_dataset, split_forget
from fastfisher.unlearning import TrainRecipe, accuracy, methods, train, unlearn
from fastfisher.unlearning.head import find_head, forget_class
from fastfisher.unlearning.scores import Scores

RECIPE = TrainRecipe(epochs=4, batch_size=16, lr=0.05, momentum=0.8, weight_decay=0.01)
EDITS = ["fisher-noise", "head-row", "influence", "logit-mask", "ssd"]
TUNINGS = ["l1-sparse", "neg-grad-plus", "salun", "scrub"]


class Trap(nn.Module):
    """Its hidden layer has as many outputs as there are classes, and its attributes mislead."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.classifier = nn.Linear(12, 5)
        self.hidden = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.head(x)))
        return self.hidden(torch.tanh(self.classifier(x.flatten(1))))


@dataclasses.dataclass(frozen=True)
class Task:
    model: nn.Module
    forget: Dataset[Any]
    remain: Dataset[Any]

    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and targets of the forget set, then of the remain set."""
        return *self.forget.tensors, *self.remain.tensors  # type: ignore[attr-defined]


@pytest.fixture
def tiny() -> Task:
    """A model in float64, with statistics in its norm, and samples of five classes."""
    model = Trap().double()
    model.train()(torch.randn(32, 1, 4, 4, dtype=torch.float64) + 0.3)
    forget = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.full((9,), 2)
    labels = torch.tensor([0, 1, 3, 4]).repeat(6)
    remain = torch.randn(24, 1, 4, 4, dtype=torch.float64), labels
    return Task(model.eval(), TensorDataset(*forget), TensorDataset(*remain))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(task: Task, method: str, **arguments: Any) -> nn.Module:
    """What the method makes of a copy of the model."""
    model = copy.deepcopy(task.model)
    unlearn(
        model,
        task.forget,
        task.remain,
        method=method,
        **{"epochs": 0, "recipe": RECIPE, **arguments},
    )
    return model


def close(got: nn.Module, expected: dict[str, Tensor]) -> None:
    """Equal to 1e-10, relative to the largest entry of each parameter."""
    for name, parameter in got.named_parameters():
        scale = float(expected[name].abs().max())
        difference = (parameter.detach() - expected[name]).abs().max()
        assert float(difference) <= 1e-10 * scale, name


def gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of the mean cross entropy."""
    named = dict(model.named_parameters())
    loss = F.cross_entropy(model(inputs), targets)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def mean_squares(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The empirical Fisher, one sample at a time."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, targets, strict=True):
        for name, value in gradient(model, x[None], y[None]).items():
            sums[name] += value**2 / len(targets)
    return {name: value.detach() for name, value in sums.items()}


def expected_squares(model: nn.Module, inputs: Tensor, classes: int) -> dict[str, Tensor]:
    """The Fisher under the model's own labels, one sample and class at a time."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in inputs:
        probabilities = model(x[None]).softmax(1)[0].detach()
        for label in range(classes):
            for name, value in gradient(model, x[None], torch.tensor([label])).items():
                sums[name] += probabilities[label] * value**2 / len(inputs)
    return {name: value.detach() for name, value in sums.items()}


@pytest.mark.parametrize("whole_class", [True, False])
def test_fisher_noise_original(tiny: Task, whole_class: bool) -> None:
    forgotten, labels, remaining, _ = tiny.samples()
    if not whole_class:
        labels = labels.clone()
        labels[0] = 1
        tiny = dataclasses.replace(tiny, forget=TensorDataset(forgotten, labels))
    h = expected_squares(tiny.model, remaining, 5)
    noise = torch.Generator().manual_seed(7)
    expected = {}
    for name, weight in tiny.model.named_parameters():
        last = name.startswith("hidden.")
        variance = (1 / (h[name] + 1e-8)).clamp(max=1e3)
        if last:
            variance = variance.clamp(max=1e2)
        variance = 1e-3 * variance
        if weight.ndim > 1:
            variance = variance.mean(1, keepdim=True).expand_as(weight).clone()
        center = weight.detach().clone()
        if last and whole_class:
            center[2] = 0
            variance[2] = 1e-4
        if last or weight.ndim == 1:
            variance = variance * 10
        draw = torch.randn(weight.shape, generator=noise, dtype=torch.float64)
        expected[name] = center + variance.sqrt() * draw
    close(run(tiny, "fisher-noise", options={"alpha": 1e-3}, seed=7), expected)


def test_fisher_noise_paper(tiny: Task) -> None:
    _, _, remaining, labels = tiny.samples()
    h = mean_squares(tiny.model, remaining, labels)
    noise = torch.Generator().manual_seed(7)
    expected = {
        name: weight.detach()
        + (1e-3**2) ** 0.25
        * (h[name] + 1e-8) ** -0.25
        * torch.randn(weight.shape, generator=noise, dtype=torch.float64)
        for name, weight in tiny.model.named_parameters()
    }
    options = {"alpha": 1e-3, "definition": "paper"}
    close(run(tiny, "fisher-noise", options=options, seed=7), expected)


def small_batches(dataset: Dataset[Any], size: int, seed: int) -> Any:
    return batches(dataset, size, shuffle=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("definition", ["paper", "original"])
def test_ssd(tiny: Task, definition: str) -> None:
    forgotten, forgotten_labels, remaining, remaining_labels = tiny.samples()
    inputs = torch.cat([forgotten, remaining])
    labels = torch.cat([forgotten_labels, remaining_labels])
    if definition == "paper":
        of_forget = mean_squares(tiny.model, forgotten, forgotten_labels)
        of_all = mean_squares(tiny.model, inputs, labels)
    else:
        of_forget, of_all = (
            {
                name: torch.stack([gradient(tiny.model, *b)[name] ** 2 for b in loader]).mean(0)
                for name, _ in tiny.model.named_parameters()
            }
            for loader in (
                list(small_batches(tiny.forget, 4, 3)),
                list(small_batches(TensorDataset(inputs, labels), 4, 3)),
            )
        )
    expected, factors = {}, []
    for name, weight in tiny.model.named_parameters():
        flat = weight.detach().clone().flatten()
        for i, (f, a) in enumerate(
            zip(of_forget[name].flatten(), of_all[name].flatten(), strict=True)
        ):
            if f > 1.5 * a:
                factors.append(min(1.8 * float(a / f), 1.0))
                flat[i] *= factors[-1]
        expected[name] = flat.view_as(weight)
    # Some are left alone, some dampened, and some selected whose quotient is above 1.
    assert 0 < len(factors) < sum(p.numel() for p in tiny.model.parameters())
    assert min(factors) < 1 and max(factors) == 1
    options = {"alpha": 1.5, "dampening": 1.8, "definition": definition}
    close(run(tiny, "ssd", options=options, batch_size=4, seed=3), expected)


def flat_hessian(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The whole Hessian of the mean cross entropy, one row at a time."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs), targets)
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in first])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def test_influence_ends_at_the_damped_newton_step(tiny: Task) -> None:
    # The loss of a linear model is convex, so that LiSSA converges.
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    task = dataclasses.replace(tiny, model=model)
    forgotten, forgotten_labels, remaining, remaining_labels = task.samples()
    inputs = torch.cat([forgotten, remaining])
    hessian = flat_hessian(model, inputs, torch.cat([forgotten_labels, remaining_labels]))
    v = flat(gradient(model, forgotten, forgotten_labels).values()) * 9 / 33
    step = torch.linalg.solve(hessian + 0.1 * 8 * torch.eye(len(v), dtype=v.dtype), v)
    options = {"damping": 0.1, "scale": 8, "passes": 300, "batch_size": 33}
    got = flat(run(task, "influence", options=options).parameters()) - flat(model.parameters())
    torch.testing.assert_close(got, step, rtol=1e-9, atol=1e-12)
    literal = run(task, "influence", options={**options, "definition": "paper"})
    got = flat(literal.parameters()) - flat(model.parameters())
    torch.testing.assert_close(got, step / 9, rtol=1e-9, atol=1e-12)


def test_influence_comes_close_to_the_retrained_convex_model(tiny: Task) -> None:
    forgotten, forgotten_labels, remaining, remaining_labels = tiny.samples()
    start = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()

    def fitted(forget_weight: float) -> nn.Module:
        """At the minimum of the sum over samples / 27 + 0.2 / 2 |w|^2."""
        model = copy.deepcopy(start)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(remaining), remaining_labels, reduction="sum")
            three = F.cross_entropy(model(forgotten[:3]), forgotten_labels[:3], reduction="sum")
            loss = (loss + forget_weight * three) / 27
            loss = loss + 0.1 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    original, retrained = fitted(1.0), fitted(0.0)
    task = Task(original, TensorDataset(forgotten[:3], forgotten_labels[:3]), tiny.remain)
    options = {"damping": 0.02, "scale": 10, "passes": 600, "batch_size": 27}
    got = run(task, "influence", options=options)
    wanted = flat(retrained.parameters()) - flat(original.parameters())
    step = flat(got.parameters()) - flat(original.parameters())
    assert float((step - wanted).norm()) < 0.4 * float(wanted.norm())


def test_influence_takes_the_steps_of_lissa(tiny: Task) -> None:
    forgotten, forgotten_labels, remaining, remaining_labels = tiny.samples()
    both = TensorDataset(
        torch.cat([forgotten, remaining]), torch.cat([forgotten_labels, remaining_labels])
    )
    v = flat(gradient(tiny.model, forgotten, forgotten_labels).values()) * 9 / 33
    d, loader = v, small_batches(both, 10, 5)
    for _ in range(2):
        for batch in loader:
            d = v + (1 - 0.01) * d - flat_hessian(tiny.model, *batch) @ d / 20
    options = {"passes": 2, "batch_size": 10}
    got = flat(run(tiny, "influence", options=options, seed=5).parameters())
    torch.testing.assert_close(got, flat(tiny.model.parameters()) + d / 20, rtol=0, atol=1e-12)


def test_influence_that_diverges_says_so_and_changes_nothing(tiny: Task) -> None:
    before = state(tiny.model)
    with pytest.raises(FloatingPointError, match=r"raise options\.scale"):
        unlearn(
            tiny.model,
            tiny.forget,
            tiny.remain,
            method="influence",
            options={"scale": 0.01, "passes": 3},
            epochs=0,
        )
    assert same(state(tiny.model), before)


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.8, weight_decay=0.01)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# One epoch at the first rate: the recipe's curve over 8 replayed epochs falls after 4.
TRAINING: dict[str, Any] = {"epochs": 3, "replay_epochs": 8, "seed": 3}


def test_l1_sparse(tiny: Task) -> None:
    model = copy.deepcopy(tiny.model).train()
    optimizer, loader = sgd(model, 0.02), small_batches(tiny.remain, 16, 3)
    for strength in (0.3, 0.2, 0.1):
        for inputs, targets in loader:
            norm = sum(p.abs().sum() for p in model.parameters())
            descend(optimizer, F.cross_entropy(model(inputs), targets) + strength * norm)
    got = run(tiny, "l1-sparse", options={"gamma": 0.3, "lr": 0.02}, **TRAINING)
    close(got, state(model))


def test_neg_grad_plus(tiny: Task) -> None:
    model = copy.deepcopy(tiny.model).train()
    optimizer, loader = sgd(model, 0.02), small_batches(tiny.remain, 4, 3)
    forget_loader = small_batches(tiny.forget, 4, 3)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from forget_loader

    forget = forever()
    for _ in range(3):
        for inputs, targets in loader:
            unwanted, labels = next(forget)
            remain_loss = F.cross_entropy(model(inputs), targets)
            descend(optimizer, 0.7 * remain_loss - 0.3 * F.cross_entropy(model(unwanted), labels))
    recipe = dataclasses.replace(RECIPE, batch_size=4)
    options = {"alpha": 0.7, "lr": 0.02}
    close(
        run(tiny, "neg-grad-plus", options=options, **{**TRAINING, "recipe": recipe}), state(model)
    )


def test_scrub(tiny: Task) -> None:
    teacher, model = tiny.model, copy.deepcopy(tiny.model).train()
    optimizer = sgd(model, 0.02)
    order = torch.Generator().manual_seed(3)
    forget, remain = (
        batches(part, 4, shuffle=True, generator=order) for part in (tiny.forget, tiny.remain)
    )

    def divergence(logits: Tensor, inputs: Tensor) -> Tensor:
        p = (teacher(inputs).detach() / 3).softmax(1)
        q = (logits / 3).softmax(1)
        return 9 * (p * (p / q).log()).sum(1).mean()

    for epoch in range(3):
        if epoch < 2:
            for inputs, _ in forget:
                descend(optimizer, -divergence(model(inputs), inputs))
        for inputs, targets in remain:
            logits = model(inputs)
            cross_entropy = F.cross_entropy(logits, targets)
            descend(optimizer, 0.4 * divergence(logits, inputs) + 0.6 * cross_entropy)
    options = {"alpha": 0.4, "gamma": 0.6, "msteps": 2, "temperature": 3, "lr": 0.02}
    recipe = dataclasses.replace(RECIPE, batch_size=4)
    close(run(tiny, "scrub", options=options, **{**TRAINING, "recipe": recipe}), state(model))


def test_salun(tiny: Task) -> None:
    forgotten, labels, remaining, remaining_labels = tiny.samples()
    of_loss = gradient(tiny.model, forgotten, labels)
    sizes = flat(of_loss.values()).abs()
    limit = sizes.sort(descending=True).values[int(0.3 * len(sizes)) - 1]
    salient = {name: (value.abs() >= limit) for name, value in of_loss.items()}
    shifts = torch.randint(1, 5, (9,), generator=torch.Generator().manual_seed(3))
    wrong = (labels + shifts) % 5
    assert not (wrong == labels).any() and len(wrong.unique()) > 1
    both = TensorDataset(torch.cat([forgotten, remaining]), torch.cat([wrong, remaining_labels]))
    model = copy.deepcopy(tiny.model).train()
    optimizer, loader = sgd(model, 0.02), small_batches(both, 16, 3)
    for _ in range(3):
        for inputs, targets in loader:
            descend(optimizer, F.cross_entropy(model(inputs), targets))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    original = tiny.model.get_parameter(name)
                    parameter[~salient[name]] = original[~salient[name]]
    got = run(tiny, "salun", options={"threshold": 0.3, "lr": 0.02}, **TRAINING)
    close(got, state(model))
    for name, parameter in got.named_parameters():
        unchanged = parameter == tiny.model.get_parameter(name)
        assert torch.equal(unchanged, ~salient[name]), name


def test_lr_none_is_the_recipes(tiny: Task) -> None:
    own = run(tiny, "l1-sparse", options={"lr": None}, epochs=1)
    same_rate = run(tiny, "l1-sparse", options={"lr": RECIPE.lr}, epochs=1)
    other = run(tiny, "l1-sparse", epochs=1)
    assert same(state(own), state(same_rate))
    assert not same(state(own), state(other))


def test_head_row_zeroes_that_row_of_the_last_layer_alone(tiny: Task) -> None:
    expected = state(tiny.model)
    expected["hidden.weight"][2] = 0
    expected["hidden.bias"][2] = 0
    assert same(state(run(tiny, "head-row")), expected)


def test_a_masked_logit_never_wins_and_the_others_are_as_before(tiny: Task) -> None:
    inputs = torch.randn(500, 1, 4, 4, dtype=torch.float64) * 100
    before = tiny.model(inputs)
    assert (before.argmax(1) == 2).any()
    masked = run(tiny, "logit-mask")
    after = masked(inputs)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(after[:, others], before[:, others])
    assert not (after.argmax(1) == 2).any()
    assert bool((after.softmax(1)[:, 2] == 0).all())
    assert torch.equal(masked.hidden.weight, tiny.model.hidden.weight)  # type: ignore[attr-defined]
    assert bool(F.cross_entropy(after, torch.full((500,), 2)).isfinite())
    tuned = run(tiny, "logit-mask", epochs=3)
    assert not (tuned(inputs).argmax(1) == 2).any()
    assert all(bool(p.isfinite().all()) for p in tuned.parameters())


def test_a_masked_logit_fits_into_half_precision(tiny: Task) -> None:
    half = {"dtype": torch.bfloat16}
    parts = [
        TensorDataset(part.tensors[0].to(**half), part.tensors[1])  # type: ignore[attr-defined]
        for part in (tiny.forget, tiny.remain)
    ]
    for dtype, lowest in ((torch.bfloat16, -9e17), (torch.float16, -32000)):
        model = copy.deepcopy(tiny.model).to(dtype)
        sets = [TensorDataset(p.tensors[0].to(dtype), p.tensors[1]) for p in parts]
        unlearn(model, *sets, method="logit-mask", epochs=0)
        bias = float(model.hidden.bias.detach()[2])  # type: ignore[union-attr, operator]
        assert float("-inf") < bias < lowest


class Wrapped(nn.Module):
    """The logits are not those of a layer but computed from them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(1)


@pytest.mark.parametrize("method", ["fisher-noise", "head-row", "logit-mask"])
def test_a_model_without_a_head_is_refused(tiny: Task, method: str) -> None:
    before = state(tiny.model)
    with pytest.raises(ValueError, match="model: expected the logits to be the output of one"):
        unlearn(Wrapped(tiny.model), tiny.forget, tiny.remain, method=method, epochs=0)
    assert same(state(tiny.model), before)


def test_the_head_is_found_by_running_the_model(tiny: Task) -> None:
    assert find_head(tiny.model, tiny.forget) is tiny.model.hidden
    convolutional = nn.Sequential(
        nn.Conv2d(1, 5, 4), nn.ReLU(), nn.Conv2d(5, 5, 1), nn.Dropout(0.5), nn.Flatten()
    ).double()
    assert find_head(convolutional, tiny.forget) is convolutional[2]
    assert all(not module._forward_hooks for module in convolutional)
    assert convolutional.training and convolutional[3].training
    with pytest.raises(ValueError, match=r"model: expected outputs \[B, C\], got \(1, 5, 1, 1\)"):
        find_head(convolutional[:3], tiny.forget)


def test_a_class_is_forgotten_only_as_a_whole(tiny: Task) -> None:
    assert forget_class(tiny.forget, tiny.remain) == 2
    assert forget_class(tiny.forget, None) == 2
    assert forget_class(tiny.remain, tiny.forget) is None
    assert forget_class(tiny.forget, tiny.forget) is None


@pytest.mark.parametrize("method", ["head-row", "logit-mask"])
def test_head_controls_need_one_class(tiny: Task, method: str) -> None:
    before = state(tiny.model)
    with pytest.raises(ValueError, match=f"forget_set: '{method}' needs samples of one class"):
        unlearn(tiny.model, tiny.remain, None, method=method, epochs=0)
    assert same(state(tiny.model), before)
    outside = TensorDataset(tiny.samples()[0], torch.full((9,), 5))
    with pytest.raises(ValueError, match=r"forget_set: class 5 is not in 0\.\.4"):
        unlearn(tiny.model, outside, None, method=method, epochs=0)


def test_logit_mask_needs_a_bias(tiny: Task) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, bias=False)).double()
    with pytest.raises(ValueError, match="model: 'logit-mask' needs a last layer with a bias"):
        unlearn(model, tiny.forget, None, method="logit-mask", epochs=0)
    unlearn(model, tiny.forget, None, method="head-row", epochs=0)
    assert not model[1].weight[2].any() and model[1].weight[1].all()


def test_salun_needs_two_classes(tiny: Task) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).double()
    zeros = TensorDataset(tiny.samples()[0], torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="model: 'salun' needs at least two classes"):
        unlearn(model, zeros, zeros, method="salun")


def test_influence_needs_something_to_change(tiny: Task) -> None:
    tiny.model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: no parameter requires grad"):
        unlearn(tiny.model, tiny.forget, tiny.remain, method="influence", epochs=0)


NEGATIVE, TEXT, NAN = -0.1, "0.1", float("nan")


@pytest.mark.parametrize(
    ("method", "name", "values"),
    [
        ("fisher-noise", "alpha", [NEGATIVE, TEXT, NAN, True]),
        ("fisher-noise", "definition", ["exact", None]),
        ("influence", "damping", [0, 1.1, TEXT]),
        ("influence", "scale", [0, TEXT]),
        ("influence", "passes", [0, 1.0]),
        ("influence", "batch_size", [0, 1.0]),
        ("influence", "definition", ["authors"]),
        ("l1-sparse", "gamma", [NEGATIVE, TEXT]),
        ("neg-grad-plus", "alpha", [NEGATIVE, 1.1, TEXT]),
        ("salun", "threshold", [0, 1.1, TEXT]),
        ("scrub", "alpha", [NEGATIVE, TEXT]),
        ("scrub", "gamma", [NEGATIVE, TEXT]),
        ("scrub", "msteps", [-1, 1.0]),
        ("scrub", "temperature", [0, TEXT]),
        ("ssd", "alpha", [NEGATIVE, TEXT]),
        ("ssd", "dampening", [NEGATIVE, TEXT]),
        ("ssd", "definition", ["authors"]),
        *((method, "lr", [0, NEGATIVE, TEXT]) for method in TUNINGS),
    ],
)
def test_bad_options_are_named_before_anything_changes(
    tiny: Task, method: str, name: str, values: list[Any]
) -> None:
    before = state(tiny.model)
    for value in values:
        wrong_type = value in (TEXT, 1.0)  # 1.0 is True, and no integer
        with pytest.raises(
            TypeError if wrong_type else ValueError, match=rf"^options\.{name}: .*{value!r}"
        ):
            unlearn(
                tiny.model, tiny.forget, tiny.remain, method=method, options={name: value}, epochs=1
            )
    assert same(state(tiny.model), before)


@pytest.mark.parametrize("method", EDITS + TUNINGS)
def test_repeats_by_seed_and_leaves_all_else_alone(tiny: Task, method: str, tmp_path: Path) -> None:
    tiny.model.norm.train()  # type: ignore[union-attr, operator]
    random = torch.get_rng_state()
    arguments: dict[str, Any] = {"epochs": 1, "options": {}}
    if method == "influence":
        arguments["options"] = {"passes": 2, "batch_size": 8}
    first = run(tiny, method, seed=1, **arguments)
    assert torch.equal(torch.get_rng_state(), random)
    torch.rand(1)
    assert same(state(run(tiny, method, seed=1, **arguments)), state(first))
    assert not same(state(run(tiny, method, seed=2, **arguments)), state(first))
    # The same from remembered scores.
    for _ in range(2):
        remembered = run(tiny, method, seed=1, **arguments, scores=Scores(tmp_path))
        assert same(state(remembered), state(first))
    assert [m.training for m in first.modules()] == [m.training for m in tiny.model.modules()]
    assert all(p.grad is None for p in first.parameters())
    assert all(not m._forward_hooks for m in first.modules())


@pytest.mark.parametrize("method", ["fisher-noise", "influence", "ssd"])
def test_edits_leave_what_does_not_require_grad(tiny: Task, method: str) -> None:
    tiny.model.classifier.requires_grad_(False)  # type: ignore[union-attr, operator]
    before = state(tiny.model)
    options = {"alpha": 0.5} if method == "ssd" else {}
    after = state(run(tiny, method, options=options))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "head.weight" in changed and "hidden.weight" in changed
    assert not {name for name in changed if "classifier" in name or "running" in name}


@pytest.mark.parametrize("method", EDITS + TUNINGS)
def test_records_stages_and_a_configuration_that_can_be_written(tiny: Task, method: str) -> None:
    result = unlearn(tiny.model, tiny.forget, tiny.remain, method=method, epochs=1, recipe=RECIPE)
    stages = ["original", "masked", "epoch"] if method in EDITS else ["original", "epoch"]
    assert [record.stage for record in result.history] == stages
    written = json.loads(json.dumps(result.config))
    names = [field.name for field in dataclasses.fields(methods()[method].Options)]
    assert list(written["options"]) == names
    if method in TUNINGS:
        assert written["recipe"]["lr"] == written["options"]["lr"] == result.history[-1].lr


@pytest.mark.parametrize("method", TUNINGS)
def test_no_epochs_change_nothing(tiny: Task, method: str) -> None:
    assert same(state(run(tiny, method)), state(tiny.model))
    result = unlearn(tiny.model, tiny.forget, None, method=method, epochs=0)
    assert [record.stage for record in result.history] == ["original"]


def test_precision_and_augmentation_reach_every_step(tiny: Task) -> None:
    """Both sets go through the recipe's augmentation and autocast."""
    seen: list[torch.dtype] = []
    model = copy.deepcopy(tiny.model).float()
    model.hidden.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, _, output: seen.append(output.dtype) if module.training else None
    )
    sets = [
        TensorDataset(part.tensors[0].float(), part.tensors[1])  # type: ignore[attr-defined]
        for part in (tiny.forget, tiny.remain)
    ]
    recipe = dataclasses.replace(RECIPE, precision="bfloat16", augment=True)
    model.train()
    for method in ("neg-grad-plus", "scrub"):
        seen.clear()
        result = unlearn(model, *sets, method=method, epochs=1, recipe=recipe)
        assert result.history[-1].loss is not None
        # Two steps on the remain set; as many batches of the forget set, or one pass over it.
        assert seen == [torch.bfloat16] * (4 if method == "neg-grad-plus" else 3)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[Dataset[Any]]]:
    """A small network that knows the digits; forget and remain, of training and of test data."""
    data = load_dataset("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
        )
    train(model, data.train, TrainRecipe(epochs=12, batch_size=64))
    sets = *split_forget(data.train, forget_class=3), *split_forget(data.test, forget_class=3)
    return model, list(sets)


@pytest.mark.parametrize(
    ("method", "arguments", "forget_at_most", "remain_at_least"),
    [
        ("fisher-noise", {}, 0.1, 0.9),
        ("head-row", {}, 0.1, 0.9),
        ("logit-mask", {}, 0.0, 0.93),
        ("ssd", {"options": {"alpha": 3}}, 0.1, 0.85),
        ("neg-grad-plus", {"epochs": 3, "options": {"alpha": 0.9}}, 0.1, 0.9),
        ("salun", {"epochs": 3, "options": {"lr": 0.05}}, 0.2, 0.9),
        ("scrub", {"epochs": 4, "options": {"lr": 0.01}}, 0.1, 0.9),
        ("l1-sparse", {"epochs": 5, "options": {"gamma": 1e-3, "lr": 0.1}}, 0.3, 0.93),
    ],
)
def test_forgets_a_digit_and_keeps_the_others(
    digits: tuple[nn.Module, list[Dataset[Any]]],
    method: str,
    arguments: dict[str, Any],
    forget_at_most: float,
    remain_at_least: float,
) -> None:
    model, (forget, remain, test_forget, test_remain) = copy.deepcopy(digits[0]), digits[1]
    assert accuracy(model, batches(test_forget, 64)) > 0.9
    recipe = TrainRecipe(epochs=12, batch_size=64)
    result = unlearn(
        model,
        forget,
        remain,
        method=method,
        recipe=recipe,
        test_forget=test_forget,
        test_remain=test_remain,
        **{"epochs": 0, **arguments},
    ).history[-1]
    assert result.test_forget is not None and result.test_remain is not None
    assert result.test_forget <= forget_at_most
    assert result.test_remain >= remain_at_least
