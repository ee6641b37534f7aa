"""Learning rates: the recipe's own schedule, and its replay within S epochs (paper, 3.4)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastfisher.unlearning import TrainRecipe, train
from fastfisher.unlearning.schedule import lr_scheduler, milestone_steps


def rates(recipe: TrainRecipe, steps_per_epoch: int, schedule_epochs: int) -> list[float]:
    """The learning rate of every step of the schedule."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = lr_scheduler(
        optimizer, recipe, steps_per_epoch=steps_per_epoch, schedule_epochs=schedule_epochs
    )
    result = [optimizer.param_groups[0]["lr"]]
    for _ in range(schedule_epochs * steps_per_epoch - 1):
        optimizer.step()
        scheduler.step()
        result.append(optimizer.param_groups[0]["lr"])
    return result


@pytest.mark.parametrize(
    ("steps_per_epoch", "schedule_epochs", "expected"),
    [
        (352, 5, (880, 1320)),  # CIFAR-10 without one class, batch 128, S = 5
        (1, 5, (2, 3)),  # 50 samples
        (352, 160, (80 * 352, 120 * 352)),  # the original schedule
        (391, 1, (195, 293)),
    ],
)
def test_paper_milestones_in_steps(
    steps_per_epoch: int, schedule_epochs: int, expected: tuple[int, ...]
) -> None:
    assert milestone_steps(TrainRecipe(), steps_per_epoch, schedule_epochs) == expected


def test_milestones_do_not_suffer_from_rounding() -> None:
    # 29 / 100 * 100 is 28.999999999999996 in floating point.
    recipe = TrainRecipe(epochs=100, milestones=(29,))
    assert int(29 / 100 * 100 * 1) == 28
    assert milestone_steps(recipe, 1, 100) == (29,)


def test_training_decays_after_the_milestones() -> None:
    recipe = TrainRecipe(epochs=6, milestones=(2, 5), lr=0.5, gamma=0.1)
    got = rates(recipe, steps_per_epoch=3, schedule_epochs=6)
    assert got == pytest.approx([0.5] * 6 + [0.05] * 9 + [0.005] * 3)


def test_replay_is_the_curve_at_the_same_fractions() -> None:
    recipe = TrainRecipe(epochs=16, milestones=(8, 12))
    got = rates(recipe, steps_per_epoch=4, schedule_epochs=2)
    assert got == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_warmup_rises_linearly_and_is_compressed_too() -> None:
    recipe = TrainRecipe(epochs=8, warmup_epochs=4, milestones=(6,), lr=1.0)
    assert rates(recipe, 1, 8) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1])
    assert rates(recipe, 1, 4) == pytest.approx([0.5, 1, 1, 0.1])


def test_onecycle_replay_is_the_compressed_cycle() -> None:
    recipe = TrainRecipe(epochs=30, lr=0.4, schedule="onecycle")
    got = rates(recipe, steps_per_epoch=10, schedule_epochs=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4, momentum=0.9)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=50, cycle_momentum=False
    )
    expected = []
    for _ in range(50):
        expected.append(reference.get_last_lr()[0])
        optimizer.step()
        if len(expected) < 50:
            reference.step()
    assert got == expected
    assert max(got) == pytest.approx(0.4)
    assert got[-1] < 1e-5


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            TrainRecipe(epochs=8, batch_size=2, milestones=(4, 6)),
            [0.1, 0.1, 0.01, 0.001, 0.001, 0.001, 0.001],
        ),
        (TrainRecipe(epochs=8, batch_size=2, milestones=()), [0.1] * 7),
    ],
)
def test_epochs_after_the_replay_stay_at_the_last_rate(
    recipe: TrainRecipe, expected: list[float]
) -> None:
    dataset = TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    stats = train(nn.Linear(3, 2), dataset, recipe, epochs=7, schedule_epochs=5)
    assert [s.epoch for s in stats] == [1, 2, 3, 4, 5, 6, 7]
    assert [s.lr for s in stats] == pytest.approx(expected)


def test_onecycle_epochs_after_the_replay_stay_at_the_last_rate() -> None:
    recipe = TrainRecipe(epochs=8, batch_size=2, schedule="onecycle")
    dataset = TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    stats = train(nn.Linear(3, 2), dataset, recipe, epochs=5, schedule_epochs=3)
    last = rates(recipe, 2, 3)[-1]
    assert [s.lr for s in stats[2:]] == [last] * 3


def test_defaults_are_the_papers() -> None:
    recipe = TrainRecipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (160, 128, 0.1)
    assert (recipe.momentum, recipe.weight_decay, recipe.gamma) == (0.9, 1e-4, 0.1)
    assert recipe.milestones == (80, 120)


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(1, ()), (2, (1,)), (3, (1, 2)), (4, (2, 3)), (30, (15, 22))]
)
def test_default_milestones_are_half_and_three_quarters(
    epochs: int, milestones: tuple[int, ...]
) -> None:
    assert TrainRecipe(epochs=epochs).milestones == milestones


@pytest.mark.parametrize(
    "recipe",
    [
        TrainRecipe(),
        TrainRecipe(epochs=9, milestones=(), augment=True, channels_last=True, seed=3),
        TrainRecipe(epochs=9, schedule="onecycle"),
    ],
)
def test_recipe_survives_json(recipe: TrainRecipe) -> None:
    assert TrainRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("values", "error", "name"),
    [
        ({"epochs": 0}, ValueError, "epochs"),
        ({"epochs": 1.0}, TypeError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"lr": "0.1"}, TypeError, "lr"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay"),
        ({"gamma": 0.0}, ValueError, "gamma"),
        ({"milestones": (120, 80)}, ValueError, "milestones"),
        ({"milestones": (80, 80)}, ValueError, "milestones"),
        ({"milestones": (80, 160)}, ValueError, "milestones"),
        ({"milestones": (0,)}, ValueError, "milestones"),
        ({"milestones": (0.5,)}, TypeError, "milestones"),
        ({"milestones": 80}, TypeError, "milestones"),
        ({"warmup_epochs": 160}, ValueError, "warmup_epochs"),
        ({"warmup_epochs": -1}, ValueError, "warmup_epochs"),
        ({"schedule": "cosine"}, ValueError, "schedule"),
        ({"schedule": "onecycle", "milestones": (3,)}, ValueError, "schedule"),
        ({"schedule": "onecycle", "warmup_epochs": 2}, ValueError, "schedule"),
        ({"augment": 1}, TypeError, "augment"),
        ({"channels_last": None}, TypeError, "channels_last"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_recipe_rejects(values: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"recipe\.{name}"):
        TrainRecipe(**values)


def test_from_dict_rejects_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown names \['learning_rate'\]"):
        TrainRecipe.from_dict({"learning_rate": 0.1})
