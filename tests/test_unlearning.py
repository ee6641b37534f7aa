"""Unlearning does what it says, changes nothing else, and can be repeated."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fastfisher.data import batches, load_dataset, size_of, split_forget, subset, targets_of
from fastfisher.fisher_diag import fisher_diag
from fastfisher.masking import fisher_mask_, random_mask_
from fastfisher.models import build
from fastfisher.unlearning import (
    Candidate,
    Edit,
    EpochRecord,
    Job,
    Method,
    Search,
    TrainRecipe,
    UnlearnResult,
    accuracy,
    base,
    methods,
    register,
    search_mask,
    train,
    unlearn,
)
from fastfisher.unlearning import search as search_module
from fastfisher.unlearning.loop import shift_and_mirror
from fastfisher.unlearning.scores import Scores
from fastfisher.unlearning.search import (
    GRANULARITIES,
    RATIOS,
    REMAIN_WEIGHTS,
    SCOPES,
    choose,
    hold_out,
    pareto,
)

RECIPE = TrainRecipe(epochs=12)


def digits_net() -> nn.Module:
    return build("convnet", num_classes=10, in_channels=1, image_size=8)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model that knows the digits, and the digits split by the class to forget."""

    model: nn.Module
    forget: Dataset[Any]
    remain: Dataset[Any]
    test_forget: Dataset[Any]
    test_remain: Dataset[Any]


@pytest.fixture(scope="module")
def trained() -> Task:
    digits = load_dataset("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits_net()
    train(model, digits.train, RECIPE)
    sets = *split_forget(digits.train, forget_class=0), *split_forget(digits.test, forget_class=0)
    return Task(model, *sets)


@pytest.fixture
def task(trained: Task) -> Task:
    """Few samples and a model of one's own."""
    return Task(
        copy.deepcopy(trained.model),
        subset(trained.forget, torch.arange(24)),
        subset(trained.remain, torch.arange(80)),
        subset(trained.test_forget, torch.arange(10)),
        subset(trained.test_remain, torch.arange(40)),
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fisher_mask_forgets_the_class_and_keeps_up_with_retraining(trained: Task) -> None:
    arguments: dict[str, Any] = {
        "recipe": RECIPE,
        "test_forget": trained.test_forget,
        "test_remain": trained.test_remain,
        "model_factory": digits_net,
    }
    sets = trained.forget, trained.remain
    result = unlearn(copy.deepcopy(trained.model), *sets, **arguments)
    reference = unlearn(trained.model, *sets, method="retrain", **arguments).history[-1]
    original, masked, *fine_tuned = result.history
    assert original.test_forget is not None and original.test_forget > 0.95
    assert masked.test_forget is not None and masked.test_forget < 0.1
    assert len(fine_tuned) == 5
    last = fine_tuned[-1]
    assert last.train_forget is not None and last.train_forget <= 0.02
    assert last.test_forget is not None and last.test_forget <= 0.02
    assert last.test_remain is not None and reference.test_remain is not None
    assert last.test_remain > reference.test_remain - 0.03
    # What the mask itself does, random masking of as many weights and fine-tuning do not.
    for method in ("random-mask", "finetune"):
        control = unlearn(copy.deepcopy(trained.model), *sets, method=method, **arguments)
        forget = control.history[-1].test_forget
        assert forget is not None and forget > 0.5


@pytest.mark.parametrize("remain_weight", [1.0, 3.5])
@pytest.mark.parametrize("granularity", ["parameter", "kernel"])
def test_fisher_mask_is_the_mask_of_the_two_mean_fishers(
    task: Task, remain_weight: float, granularity: Any
) -> None:
    expected_model = copy.deepcopy(task.model)
    settings: dict[str, Any] = {
        "ratio": 0.01,
        "remain_weight": remain_weight,
        "granularity": granularity,
        "exclude": ("0.*",),
    }
    fishers = [
        fisher_diag(expected_model, batches(part, 7), reduction="mean")
        for part in (task.forget, task.remain)
    ]
    expected = fisher_mask_(expected_model, *fishers, **settings)
    before = state(task.model)
    result = unlearn(task.model, task.forget, task.remain, epochs=0, batch_size=7, **settings)
    assert result.model is task.model
    assert result.mask is not None
    assert result.mask.k == expected.k > 0
    assert same(state(task.model), state(expected_model))
    assert not same(state(task.model), before)
    result.mask.undo_(task.model)
    assert same(state(task.model), before)


def by_kind(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("scope", ["layer", by_kind])
@pytest.mark.parametrize("method", ["fisher-mask", "random-mask"])
def test_the_ratio_is_one_of_each_group_of_the_scope(task: Task, method: str, scope: Any) -> None:
    key = by_kind if scope is by_kind else (lambda name: name.rpartition(".")[0])
    result = unlearn(
        task.model, task.forget, task.remain, method=method, ratio=0.25, scope=scope, epochs=0
    )
    sizes, counts = {}, {}
    assert result.mask is not None
    for name, count in result.mask.counts.items():
        sizes.setdefault(key(name), []).append(dict(task.model.named_parameters())[name].numel())
        counts.setdefault(key(name), []).append(count)
    assert len(sizes) > 1
    for group, parts in sizes.items():
        assert sum(counts[group]) == sum(parts) // 4
    assert len(result.mask.groups) == len(sizes)
    written = "test_unlearning:by_kind" if scope is by_kind else "layer"
    assert str(result.config["scope"]).endswith(written)
    json.dumps(result.config)


def test_the_search_has_the_scope(task: Task) -> None:
    result = unlearn(
        task.model, task.forget, task.remain, remain_weight="auto", scope="layer", epochs=0
    )
    assert result.mask is not None and len(result.mask.groups) > 1
    assert result.chosen is not None and result.chosen["k"] == result.mask.k


def test_random_mask_draws_as_many_units_from_the_seed(task: Task) -> None:
    expected_model = copy.deepcopy(task.model)
    mask = random_mask_(expected_model, ratio=0.3, generator=torch.Generator().manual_seed(5))
    result = unlearn(
        task.model, task.forget, task.remain, method="random-mask", ratio=0.3, seed=5, epochs=0
    )
    assert result.mask is not None
    assert result.mask.k == mask.k > 0
    assert same(state(task.model), state(expected_model))


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("fisher-mask", ["original", "masked"]),
        ("random-mask", ["original", "masked"]),
        ("finetune", ["original"]),
    ],
)
@pytest.mark.parametrize("epochs", [0, 2])
def test_history_has_every_stage_with_accuracies_of_that_moment(
    task: Task, method: str, stages: list[str], epochs: int
) -> None:
    original = copy.deepcopy(task.model)
    seen: list[EpochRecord] = []
    result = unlearn(
        task.model,
        task.forget,
        task.remain,
        method=method,
        epochs=epochs,
        recipe=dataclasses.replace(RECIPE, batch_size=16),
        test_forget=task.test_forget,
        test_remain=task.test_remain,
        on_epoch=seen.append,
    )
    assert [record.stage for record in result.history] == stages + ["epoch"] * epochs
    assert [record.epoch for record in result.history[len(stages) :]] == [1, 2][:epochs]
    assert seen == result.history
    for model, record in ((original, result.history[0]), (task.model, result.history[-1])):
        for name, part in (
            ("train_forget", task.forget),
            ("train_remain", task.remain),
            ("test_forget", task.test_forget),
            ("test_remain", task.test_remain),
        ):
            assert getattr(record, name) == accuracy(model, batches(part, 64))
    for record in result.history:
        assert (record.loss is None) == (record.lr is None) == (record.stage != "epoch")
        assert record.seconds >= 0
    assert result.history[0].seconds == 0


def test_accuracies_without_a_test_set_are_none(task: Task) -> None:
    record = unlearn(task.model, task.forget, task.remain, method="finetune", epochs=0).history[0]
    assert record.test_forget is record.test_remain is None
    assert record.train_forget is not None


def test_finetune_of_zero_epochs_changes_nothing(task: Task) -> None:
    before = state(task.model)
    result = unlearn(task.model, task.forget, task.remain, method="finetune", epochs=0)
    assert same(state(task.model), before)
    assert result.mask is None


def test_finetune_is_sgd_on_the_remain_set_with_the_replayed_rate(task: Task) -> None:
    recipe = TrainRecipe(epochs=8, batch_size=16, lr=0.05, momentum=0.8, weight_decay=0.01)
    by_hand = copy.deepcopy(task.model).train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.8, weight_decay=0.01)
    loader = batches(task.remain, 16, shuffle=True, generator=torch.Generator().manual_seed(3))
    assert len(loader) == 5
    # Half and three quarters of S = 2 epochs of 5 steps each: after 5 and after 7 steps.
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 7], 0.1)
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(by_hand(inputs), targets).backward()
            optimizer.step()
            scheduler.step()
    arguments: dict[str, Any] = {"recipe": recipe, "replay_epochs": 2, "epochs": 3, "seed": 3}
    result = unlearn(task.model, task.forget, task.remain, method="finetune", **arguments)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(task.model.state_dict()[name], value, msg=name)
    assert [r.lr for r in result.history[1:]] == pytest.approx([0.05, 0.0005, 0.0005])


def test_retrain_trains_a_fresh_model_and_leaves_the_original(task: Task) -> None:
    recipe = TrainRecipe(epochs=2, batch_size=16)
    before = state(task.model)
    result = unlearn(
        task.model,
        task.forget,
        task.remain,
        method="retrain",
        recipe=recipe,
        seed=4,
        model_factory=digits_net,
    )
    assert same(state(task.model), before)
    assert result.model is not task.model
    with torch.random.fork_rng():
        torch.manual_seed(4)
        expected = digits_net()
    train(expected, task.remain, recipe, seed=4)
    assert isinstance(result.model, nn.Module)
    assert same(state(result.model), state(expected))
    assert [record.stage for record in result.history] == ["original", "epoch", "epoch"]
    assert result.config["epochs"] == 2


class DropoutNet(nn.Module):
    """Draws random numbers in training, and has modules in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(F.relu(self.norm(self.hidden(x.flatten(1))))))


METHODS = ["fisher-mask", "random-mask", "finetune", "retrain"]


@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_by_seed_and_leave_the_callers_random_numbers_alone(
    task: Task, method: str
) -> None:
    original = DropoutNet()
    before = torch.get_rng_state()

    def run(seed: int) -> dict[str, Tensor]:
        model = copy.deepcopy(original)
        result = unlearn(
            model,
            task.forget,
            task.remain,
            method=method,
            epochs=1,
            recipe=TrainRecipe(epochs=2, batch_size=16),
            seed=seed,
            model_factory=DropoutNet,
        )
        assert isinstance(result.model, nn.Module)
        return state(result.model)

    first = run(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert same(run(1), first)
    assert not same(run(2), first)


@pytest.mark.parametrize("method", METHODS)
def test_every_module_keeps_its_mode(task: Task, method: str) -> None:
    model = DropoutNet().train()
    model.norm.eval()
    unlearn(
        model,
        task.forget,
        task.remain,
        method=method,
        epochs=1,
        recipe=TrainRecipe(epochs=1),
        model_factory=DropoutNet,
    )
    assert [m.training for m in (model, model.hidden, model.norm)] == [True, True, False]


def test_fine_tuning_trains_in_train_mode_and_only_what_requires_grad(task: Task) -> None:
    model = DropoutNet().eval()
    model.hidden.weight.requires_grad_(False)
    before = state(model)
    unlearn(model, task.forget, task.remain, method="finetune", epochs=1)
    after = state(model)
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    assert not torch.equal(after["out.weight"], before["out.weight"])
    assert torch.equal(after["hidden.weight"], before["hidden.weight"])
    assert all(p.grad is None for p in model.parameters())


def test_train_gives_modes_and_random_numbers_back(task: Task) -> None:
    model = DropoutNet().eval()
    model.drop.train()
    before = torch.get_rng_state()
    train(model, task.remain, TrainRecipe(epochs=1))
    assert [m.training for m in (model, model.norm, model.drop)] == [False, False, True]
    assert torch.equal(torch.get_rng_state(), before)


def bad(**arguments: Any) -> dict[str, Any]:
    return arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(method="magic"), ValueError, "method: expected one of .*'finetune'"),
        (bad(ratio=1.01), ValueError, "ratio"),
        (bad(ratio=float("nan")), ValueError, "ratio"),
        (bad(ratio="0.1"), TypeError, "ratio"),
        (bad(remain_weight=-1.0), ValueError, "remain_weight"),
        (bad(remain_weight=math.inf), ValueError, "remain_weight"),
        (bad(remain_weight="best"), TypeError, "remain_weight"),
        (bad(granularity="row"), ValueError, "granularity"),
        (bad(exclude="fc.weight"), TypeError, "exclude"),
        (bad(scope="row"), ValueError, "scope"),
        (bad(scope=lambda name: [name]), TypeError, "scope must return hashable .* got list"),
        (bad(exclude=("no such *",)), ValueError, "exclude"),
        (bad(epochs=-1), ValueError, "epochs"),
        (bad(epochs=1.0), TypeError, "epochs"),
        (bad(replay_epochs=0), ValueError, "replay_epochs"),
        (bad(batch_size=0), ValueError, "batch_size"),
        (bad(seed=-1), ValueError, "seed"),
        (bad(recipe={"lr": 0.1}), TypeError, "recipe"),
        (bad(model_factory=3), TypeError, "model_factory"),
        (bad(on_epoch=3), TypeError, "on_epoch"),
        (bad(forget_set=None), TypeError, "forget_set"),
        (bad(remain_set=[]), ValueError, "remain_set"),
        (bad(remain_set=Dataset()), TypeError, "remain_set"),
        (bad(test_forget=[]), ValueError, "test_forget"),
        (bad(method="retrain", recipe=RECIPE), ValueError, "model_factory"),
        (bad(method="retrain", model_factory=digits_net), ValueError, "recipe"),
        (
            bad(method="retrain", model_factory=lambda: 3, recipe=RECIPE),
            TypeError,
            "model_factory",
        ),
        (
            bad(
                remain_set=TensorDataset(torch.zeros(2, 1, 8, 8), torch.tensor([3, 10])),
                method="finetune",
            ),
            ValueError,
            r"a target is not in 0\.\.9",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(
    task: Task, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before, random = state(task.model), torch.get_rng_state()
    modes = [module.training for module in task.model.modules()]
    sets = {"forget_set": task.forget, "remain_set": task.remain}
    with pytest.raises(error, match=message):
        unlearn(task.model, **{**sets, **arguments})
    assert same(state(task.model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in task.model.modules()] == modes


def test_retrain_refuses_a_factory_that_returns_the_original(task: Task) -> None:
    with pytest.raises(ValueError, match="returned the original model"):
        unlearn(
            task.model,
            task.forget,
            task.remain,
            method="retrain",
            recipe=RECIPE,
            model_factory=lambda: nn.Sequential(task.model),
        )


def test_the_model_must_be_a_module(task: Task) -> None:
    with pytest.raises(TypeError, match="model: expected a Module"):
        unlearn(lambda x: x, task.forget, task.remain)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [TrainRecipe(epochs=4, lr=1e20), TrainRecipe(epochs=4, lr=1e9)])
def test_a_diverging_loss_names_epoch_and_rate(task: Task, recipe: TrainRecipe) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    rate = f"{recipe.lr:g}".replace("+", r"\+")
    message = rf"became (nan|inf) in epoch \d .*learning rate {rate}"
    with pytest.raises(FloatingPointError, match=message):
        train(model, task.remain, dataclasses.replace(recipe, batch_size=8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": {}}, TypeError, "recipe"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"schedule_epochs": 0}, ValueError, "schedule_epochs"),
        ({"seed": -1}, ValueError, "seed"),
        ({"model": nn.ReLU()}, ValueError, "no parameter requires grad"),
        (
            {
                "dataset": TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)),
                "recipe": TrainRecipe(augment=True),
            },
            ValueError,
            "augment",
        ),
    ],
)
def test_bad_arguments_of_train(
    task: Task, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = state(task.model)
    with pytest.raises(error, match=message):
        train(**{"model": task.model, "dataset": task.remain, "recipe": RECIPE, **arguments})
    assert same(state(task.model), before)


def test_channels_last_trains_to_the_same_weights_and_format(task: Task) -> None:
    recipe = TrainRecipe(epochs=1, batch_size=16, lr=0.01)
    other = copy.deepcopy(task.model)
    train(task.model, task.remain, recipe)
    formats = []

    def note_formats(_: Any) -> None:
        formats.append([p.is_contiguous() for p in other.parameters() if p.ndim == 4])

    train(
        other, task.remain, dataclasses.replace(recipe, channels_last=True), on_epoch=note_formats
    )
    assert not all(formats[0])
    assert all(p.is_contiguous() for p in other.parameters())
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_augmented_images_are_shifted_and_half_of_them_mirrored() -> None:
    images = torch.rand(40, 2, 5, 6) + 1
    padded = F.pad(images, (4, 4, 4, 4))
    got = shift_and_mirror(images, torch.Generator().manual_seed(0))
    assert got.shape == images.shape
    found = []
    for n in range(40):
        matches = [
            (top, left, mirror)
            for top, left, mirror in itertools.product(range(9), range(9), (False, True))
            if torch.equal(
                got[n],
                (lambda crop, m: crop.flip(2) if m else crop)(
                    padded[n, :, top : top + 5, left : left + 6], mirror
                ),
            )
        ]
        assert matches
        found.append(matches[0])
    assert len({top for top, _, _ in found}) > 5
    assert len({left for _, left, _ in found}) > 5
    assert 10 < sum(mirror for _, _, mirror in found) < 30
    again = shift_and_mirror(images, torch.Generator().manual_seed(0))
    assert torch.equal(again, got)


def test_augmentation_is_used_and_seeded(task: Task) -> None:
    def weights(augment: bool) -> dict[str, Tensor]:
        model = copy.deepcopy(task.model)
        train(model, task.remain, TrainRecipe(epochs=1, batch_size=16, augment=augment))
        return state(model)

    assert same(weights(True), weights(True))
    assert not same(weights(True), weights(False))


def test_accuracy_counts_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.99), nn.Identity())
    outputs = torch.tensor([[2.0, 1, 0], [0, 2, 1], [1, 0, 2], [1, 2, 0]])
    dataset = TensorDataset(outputs, torch.tensor([0, 1, 2, 0]))
    assert accuracy(model, batches(dataset, 3)) == 0.75
    assert model.training and model[0].training


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"not in 0\.\.2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), r"not in 0\.\.2"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 1]), r"expected outputs \[B, C\]"),
        (torch.zeros(2, 3), torch.tensor([[0], [1]]), r"expected outputs \[B, C\]"),
    ],
)
def test_accuracy_rejects(outputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(nn.Identity(), [(outputs, targets)])
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(nn.Identity(), [])


@pytest.fixture
def fishers(task: Task) -> tuple[Any, Any]:
    return tuple(fisher_diag(task.model, batches(s, 64)) for s in (task.forget, task.remain))


def search(task: Task, fishers: tuple[Any, Any], **arguments: Any) -> Search:
    held = batches(task.test_forget, 64), batches(task.test_remain, 64)
    return search_mask(task.model, *fishers, *held, **arguments)


def test_search_measures_what_each_mask_does_and_restores_the_model(
    task: Task, fishers: tuple[Any, Any]
) -> None:
    before = state(task.model)
    found = search(task, fishers, ratios=(0.02, 0.002), extra_ratio=0.3)
    assert same(state(task.model), before)
    assert found.grid == 3 * 2 * 2 * (len(REMAIN_WEIGHTS) + 1)
    assert (found.held_forget, found.held_remain) == (10, 40)
    assert found.chosen in found.candidates
    settings = {(c.ratio, c.granularity, c.scope) for c in found.candidates}
    assert settings == set(
        itertools.product((0.002, 0.02, 0.3), ("parameter", "kernel"), ("global", "layer"))
    )
    for candidate in found.candidates:
        mask = fisher_mask_(
            task.model,
            *fishers,
            ratio=candidate.ratio,
            remain_weight=candidate.remain_weight,
            granularity=candidate.granularity,
            scope=candidate.scope,
        )
        assert candidate.k == mask.k
        assert candidate.forget == accuracy(task.model, batches(task.test_forget, 64))
        assert candidate.remain == accuracy(task.model, batches(task.test_remain, 64))
        mask.undo_(task.model)


def test_search_finds_what_the_whole_grid_has(trained: Task) -> None:
    forget_fisher, remain_fisher = (
        fisher_diag(trained.model, batches(part, 128)) for part in (trained.forget, trained.remain)
    )
    fishers = forget_fisher, remain_fisher
    found = search(trained, fishers)
    best = 0.0
    for granularity, scope, ratio, weight in itertools.product(
        GRANULARITIES, SCOPES, RATIOS, REMAIN_WEIGHTS
    ):
        mask = fisher_mask_(
            trained.model,
            *fishers,
            ratio=ratio,
            remain_weight=weight,
            granularity=granularity,
            scope=scope,
        )
        if accuracy(trained.model, batches(trained.test_forget, 128)) <= 0.005:
            best = max(best, accuracy(trained.model, batches(trained.test_remain, 128)))
        mask.undo_(trained.model)
    assert found.chosen.forget <= 0.005
    assert best - 0.001 <= found.chosen.remain
    # At a third of the price.
    assert len(found.candidates) < found.grid / 2


def fake_search(
    monkeypatch: pytest.MonkeyPatch, forget: Callable[[float], float], **arguments: Any
) -> Search:
    """Search where the accuracies are functions of w: that of ``forget``, and 1 - 1 / (1 + w)."""
    model = nn.Linear(1, 1, bias=False)
    seen: list[float] = []

    class Plan:
        def apply_(self) -> Any:
            return SimpleNamespace(k=1, undo_=lambda model: None)

    def plan(*_: Any, remain_weight: float, **__: Any) -> list[Plan]:
        seen.append(remain_weight)
        return [Plan()]

    def remain(*_: Any) -> tuple[float, float]:
        return 1 - 1 / (1 + seen[-1]), 1 / seen[-1]

    monkeypatch.setattr(search_module, "plan_masks", plan)
    monkeypatch.setattr(search_module, "accuracy", lambda *_: forget(seen[-1]))
    monkeypatch.setattr(search_module, "accuracy_and_loss", remain)
    fisher: Any = SimpleNamespace(reduction="mean", samples=1)
    batch = torch.zeros(1, 1), torch.zeros(1)
    found = search_mask(
        model, fisher, fisher, [batch], [batch] * 2, scopes=("global",), **arguments
    )
    assert sorted(c.remain_weight for c in found.candidates) == sorted(set(seen))
    assert len(seen) == len(set(seen)), "nothing is measured twice"
    return found


def test_search_closes_in_on_the_largest_weight_that_forgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one: dict[str, Any] = {"ratios": (0.1,), "granularities": ("parameter",)}
    found = fake_search(monkeypatch, lambda w: float(w > 7.1), **one)
    # 6 of the grid forgets and 8 does not; three halvings of the logarithm between them.
    assert 7.1 * (6 / 8) ** (1 / 8) <= found.chosen.remain_weight <= 7.1
    assert len(found.candidates) <= 4 + 3 * 2
    # Beyond the largest weight of the grid, where the tie rule stops it.
    found = fake_search(monkeypatch, lambda w: 0.0, **one, tie=0.0)
    assert found.chosen.remain_weight == 64 * 2**3


def test_search_where_nothing_forgets_takes_the_best_trade_off(
    task: Task, fishers: tuple[Any, Any]
) -> None:
    # No accuracy is below zero, so that no candidate qualifies and all of the grid is measured.
    arguments: dict[str, Any] = {"ratios": (0.0, 0.0005, 0.02), "scopes": ("global",)}
    found = search(task, fishers, **arguments, max_forget=-1.0)
    assert len(found.candidates) >= found.grid
    gains = [c.remain - c.forget for c in found.candidates]
    assert found.chosen.remain - found.chosen.forget == max(gains)


def test_search_restores_the_model_when_it_is_interrupted(
    task: Task, fishers: tuple[Any, Any]
) -> None:
    before = state(task.model)
    broken = [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 99]))]
    with pytest.raises(ValueError, match="a target is not in"):
        search_mask(task.model, *fishers, broken, broken, ratios=(0.3,))
    assert same(state(task.model), before)


def candidate(w: float, ratio: float, forget: float, remain: float, loss: float = 0.0) -> Candidate:
    return Candidate(w, ratio, "parameter", "global", 1, forget, remain, loss)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        # The largest remain accuracy of those that forget.
        ([(1, 0.1, 0.0, 0.80), (2, 0.1, 0.005, 0.90), (3, 0.1, 0.006, 0.99)], 1),
        # Within a tenth of a point: the smaller loss,
        ([(1, 0.1, 0.0, 0.9005, 0.4), (2, 0.1, 0.004, 0.9, 0.3)], 1),
        # then the smaller w,
        ([(2, 0.1, 0.0, 0.9005), (1, 0.2, 0.0, 0.9)], 1),
        # then the smaller R.
        ([(1, 0.2, 0.0, 0.9005), (1, 0.1, 0.0, 0.9)], 1),
        # Two tenths of a point are no tie.
        ([(1, 0.1, 0.0, 0.9, 0.1), (2, 0.1, 0.004, 0.902, 0.2)], 1),
        # Nothing forgets: the largest difference.
        ([(1, 0.1, 0.5, 0.9), (2, 0.1, 0.1, 0.6), (3, 0.1, 0.9, 0.95)], 1),
    ],
)
def test_choice_of_the_search(candidates: list[Any], best: int) -> None:
    made = [candidate(*values) for values in candidates]
    assert choose(made, 0.005, 0.001) is made[best]
    assert choose(made[::-1], 0.005, 0.001) is made[best]


def test_pareto_has_what_no_other_candidate_beats() -> None:
    made = [
        candidate(*values)
        for values in [
            (1, 0.1, 0.0, 0.5),
            (2, 0.1, 0.0, 0.8),
            (3, 0.1, 0.2, 0.8),
            (4, 0.1, 0.3, 0.9),
            (5, 0.1, 0.3, 0.9),
            (6, 0.1, 0.4, 0.7),
        ]
    ]
    assert pareto(made) == [made[1], made[3]]
    for each in made:
        beaten = any(
            other.forget <= each.forget
            and other.remain >= each.remain
            and (other.forget, other.remain) != (each.forget, each.remain)
            for other in made
        )
        same_as_one = any((c.forget, c.remain) == (each.forget, each.remain) for c in pareto(made))
        assert beaten != same_as_one


@pytest.mark.parametrize(
    "grids", [{"ratios": ()}, {"remain_weights": ()}, {"granularities": ()}, {"scopes": ()}]
)
def test_search_rejects_empty_grids(
    task: Task, fishers: tuple[Any, Any], grids: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="at least one value"):
        search(task, fishers, **grids)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf])
def test_search_rejects_weights_without_a_logarithm(
    task: Task, fishers: tuple[Any, Any], weight: float
) -> None:
    with pytest.raises(ValueError, match="remain_weights: expected positive finite numbers, got"):
        search(task, fishers, remain_weights=(1.0, weight))


def test_search_rejects_sums(task: Task, fishers: tuple[Any, Any]) -> None:
    sums = SimpleNamespace(reduction="sum")
    with pytest.raises(ValueError, match="remain_fisher: expected reduction 'mean'"):
        search(task, (fishers[0], sums))
    with pytest.raises(ValueError, match="forget_fisher: expected reduction 'mean'"):
        search(task, (sums, fishers[1]))


def test_auto_masks_by_the_chosen_candidate_of_held_out_training_images(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastfisher.unlearning import fisher_mask as module

    scored: list[Tensor] = []
    held: list[Tensor] = []

    class Spy(Scores):
        def fisher(self, model: nn.Module, dataset: Dataset[Any], **arguments: Any) -> Any:
            scored.append(torch.cat([inputs for inputs, _ in batches(dataset, 64)]))
            return super().fisher(model, dataset, **arguments)

    def spy_search(model: nn.Module, f: Any, r: Any, *sets: Any, **arguments: Any) -> Any:
        held.extend(torch.cat([inputs for inputs, _ in data]) for data in sets)
        return search_mask(model, f, r, *sets, **arguments, remain_weights=(1.0, 3.0))

    monkeypatch.setattr(module, "search_mask", spy_search)
    original = copy.deepcopy(task.model)
    arguments: dict[str, Any] = {"remain_weight": "auto", "ratio": 0.015, "epochs": 0}
    result = unlearn(
        task.model,
        task.forget,
        task.remain,
        **arguments,
        scope=half_of,
        test_forget=task.test_forget,
        test_remain=task.test_remain,
        scores=Spy(),
    )
    # Scored and held-out images are together the training images, each once.
    for part, seen, kept in zip((task.forget, task.remain), scored, held, strict=True):
        assert len(kept) == size_of(part) // 2 or len(kept) == 50
        expected = torch.stack([part[i][0] for i in range(size_of(part))])
        used = torch.cat([seen, kept]).flatten(1).tolist()
        partition = sorted(used) == sorted(expected.flatten(1).tolist())
        assert partition
    chosen = result.chosen
    assert result.search is not None and chosen is not None
    assert chosen in result.search["candidates"]
    # The ratio of the call is among the candidates; the scope of the call is the only one.
    assert 0.015 in {c["ratio"] for c in result.search["candidates"]}
    assert {c["scope"] for c in result.search["candidates"]} == {f"{__name__}:half_of"}
    assert {c["granularity"] for c in result.search["candidates"]} == {"parameter", "kernel"}
    json.dumps(result.search)
    assert result.mask is not None
    assert (
        result.mask.ratio,
        result.mask.remain_weight,
        result.mask.k,
        result.mask.granularity,
    ) == (chosen["ratio"], chosen["remain_weight"], chosen["k"], chosen["granularity"])
    result.mask.undo_(task.model)
    assert same(state(task.model), state(original))
    assert result.config["remain_weight"] == "auto"
    # Test images make no difference.
    again = unlearn(original, task.forget, task.remain, **arguments, scope=half_of)
    assert again.search == result.search


@pytest.mark.parametrize(
    ("arguments", "granularities", "scopes"),
    [
        ({}, {"parameter", "kernel"}, {"global", "layer"}),
        ({"granularity": "kernel"}, {"kernel"}, {"global", "layer"}),
        ({"scope": "layer"}, {"parameter", "kernel"}, {"layer"}),
        ({"options": {"search_granularities": ["parameter"]}}, {"parameter"}, {"global", "layer"}),
        ({"options": {"search_scopes": ["global"]}}, {"parameter", "kernel"}, {"global"}),
    ],
)
def test_the_search_leaves_alone_what_the_call_decides(
    task: Task, arguments: dict[str, Any], granularities: set[str], scopes: set[str]
) -> None:
    result = unlearn(
        task.model, task.forget, task.remain, remain_weight="auto", epochs=0, **arguments
    )
    assert result.search is not None
    assert {c["granularity"] for c in result.search["candidates"]} == granularities
    assert {c["scope"] for c in result.search["candidates"]} == scopes


def half_of(name: str) -> bool:
    return name < "5"


@pytest.mark.parametrize(
    ("sizes", "cap", "held_sizes"),
    [
        ([600, 300, 100], 1000, [60, 30, 10]),  # a tenth
        ([600, 300, 100], 40, [24, 12, 4]),  # the cap
        ([100, 60, 40], 1000, [25, 15, 10]),  # at least 50
        ([20, 10, 10], 1000, [10, 5, 5]),  # at most a half
        ([1, 1], 1000, None),
    ],
)
def test_hold_out_is_a_stratified_partition(
    sizes: list[int], cap: int, held_sizes: list[int] | None
) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    dataset = TensorDataset(torch.arange(len(labels)), labels)

    def draw(seed: int) -> tuple[list[int], list[int]]:
        generator = torch.Generator().manual_seed(seed)
        rest, held = hold_out(dataset, cap=cap, generator=generator)
        if held_sizes is not None:
            assert targets_of(held).bincount().tolist() == held_sizes
        return (
            [int(rest[i][0]) for i in range(size_of(rest))],
            [int(held[i][0]) for i in range(size_of(held))],
        )

    rest, held = draw(0)
    assert sorted(rest + held) == list(range(len(labels)))
    assert draw(0) == (rest, held)
    if sum(sizes) > 2:
        assert draw(1) != (rest, held)


def test_hold_out_needs_two_samples() -> None:
    dataset = TensorDataset(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2"):
        hold_out(dataset, cap=10, generator=torch.Generator())


@pytest.fixture
def result(task: Task) -> UnlearnResult:
    return unlearn(
        task.model,
        task.forget,
        task.remain,
        exclude=("0.*",),
        epochs=1,
        recipe=TrainRecipe(epochs=4, milestones=(1,)),
        test_remain=task.test_remain,
    )


def test_result_survives_the_disk(result: UnlearnResult, tmp_path: Path) -> None:
    result.save(tmp_path / "new" / "run")
    folder = tmp_path / "new" / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "mask.safetensors",
        "model.safetensors",
        "result.json",
    ]
    fresh = digits_net()
    loaded = UnlearnResult.load(folder, fresh)
    assert loaded.model is fresh
    assert result.model is not None and same(state(fresh), state(result.model))
    assert loaded.history == result.history
    assert loaded.config == result.config
    assert loaded.method == "fisher-mask"
    assert loaded.search is None
    assert loaded.mask is not None and result.mask is not None
    assert loaded.mask.counts == result.mask.counts
    assert TrainRecipe.from_dict(loaded.config["recipe"]).milestones == (1,)
    assert loaded.config["samples"] == {"train_forget": 24, "train_remain": 80, "test_remain": 40}
    assert UnlearnResult.load(folder).model is None


def test_saving_over_a_result_leaves_no_old_mask(result: UnlearnResult, tmp_path: Path) -> None:
    result.save(tmp_path)
    result.mask = None
    result.save(tmp_path)
    assert UnlearnResult.load(tmp_path).mask is None


def test_loading_what_is_no_result(result: UnlearnResult, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        UnlearnResult.load(tmp_path)
    result.save(tmp_path)
    with pytest.raises(ValueError, match="another model"):
        UnlearnResult.load(tmp_path, nn.Linear(2, 2))
    path = tmp_path / "result.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format": "something else"}))
    with pytest.raises(ValueError, match="not written by"):
        UnlearnResult.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        UnlearnResult.load(tmp_path)
    loaded = UnlearnResult("finetune", {}, [], None)
    with pytest.raises(ValueError, match="cannot be saved"):
        loaded.save(tmp_path)


def test_a_new_method_is_one_registered_class(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))

    @register
    class HeadOnly(Method):
        name = "head-only"
        edits_weights = True

        def edit(self, job: Job) -> Edit:
            with torch.no_grad():
                list(job.model.parameters())[-1].normal_()
            return Edit(job.model)

    assert list(methods())[-1] == "head-only"
    models = [copy.deepcopy(task.model) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        before = torch.get_rng_state()
        result = unlearn(model, task.forget, task.remain, method="head-only", epochs=1, seed=seed)
        # Even a method that draws from the global generator goes by the seed alone.
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
    assert same(state(models[0]), state(models[1]))
    assert not same(state(models[0]), state(models[2]))
    assert [record.stage for record in result.history] == ["original", "masked", "epoch"]
    assert result.method == "head-only"
    with pytest.raises(ValueError, match="registered already"):
        register(HeadOnly)


def test_progress_is_silent_without_a_terminal(
    task: Task, capfd: pytest.CaptureFixture[str]
) -> None:
    unlearn(task.model, task.forget, task.remain, remain_weight="auto", epochs=1, progress=True)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
