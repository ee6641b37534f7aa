"""What each kind of task does: train a model, unlearn with one, audit what was unlearned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from .. import models
from ..data import batches, size_of, subset
from ..metrics.outputs import Outputs, outputs
from ..metrics.readout import relearn_epochs
from ..runs import WEIGHTS, load_weights, save_weights
from ..unlearning import (
    EpochRecord,
    EpochStats,
    TrainRecipe,
    accuracy,
    train,
    unlearn,
)
from ..unlearning.loop import seeded
from ..unlearning.metrics import device_of
from ..unlearning.scores import Scores
from . import audit, measure
from .audit import OUTPUTS
from .engine import Setting
from .plan import Task
from .views import View, part_of, view_of

# Of the remain set, whose whole is not needed to see how a model treats its training data.
_REMAIN_SAMPLES = 2000


# What a run of a method tells beside its history.
OF_A_RUN = (
    "original",
    "edited",
    "final",
    "confusion_shift",
    "chosen",
    "search",
    "mask",
    "seconds",
)


def run_task(task: Task, setting: Setting) -> dict[str, Any]:
    """Do a task; the parts of its result that are not tensors come back."""
    runners: dict[str, Callable[[Task, Setting], dict[str, Any]]] = {
        "train": _train,
        "unlearn": _unlearn,
        "relearn": _relearn,
        "audit": audit.run,
    }
    return runners[task.kind](task, setting)


def _train(task: Task, setting: Setting) -> dict[str, Any]:
    """Train a fresh model: an original one, one retrained on the remain set, or on a half."""
    params, view = task.params, view_of(task.params, setting)
    recipe = TrainRecipe.from_dict(params["train"])
    model = _fresh(params, view, setting, params["seed"])
    dataset = view.remain if params["remain_only"] else view.train
    extra: dict[str, Dataset[Any]] = {}
    if params["half"]:
        order = torch.randperm(
            size_of(dataset), generator=torch.Generator().manual_seed(params["seed"])
        )
        inside, outside = order.chunk(2)
        extra = {"inside": subset(dataset, inside), "outside": subset(dataset, outside)}
        dataset = extra["inside"]
    history: list[dict[str, Any]] = []

    def right(dataset: Dataset[Any]) -> float:
        with recipe.autocast(device_of(model)):
            return accuracy(model, batches(dataset, params["batch_size"]))

    def on_epoch(stats: EpochStats) -> None:
        record = EpochRecord(
            stage="epoch",
            epoch=stats.epoch,
            lr=stats.lr,
            loss=stats.loss,
            seconds=stats.seconds,
            train_forget=None,
            train_remain=None,
            test_forget=right(view.test_forget),
            test_remain=right(view.test_remain),
        )
        history.append(dataclasses.asdict(record))

    train(model, dataset, recipe, seed=params["seed"], on_epoch=on_epoch)
    folder = setting.of(task)
    save_weights(model, folder / WEIGHTS)
    found = all_outputs(model, view, recipe, params["batch_size"], extra)
    measure.save_outputs(folder / OUTPUTS, found)
    return {
        "history": history,
        "accuracies": {name: each.accuracy for name, each in found.items()},
        "seconds": {"edit": 0.0, "fit": sum(record["seconds"] for record in history)},
    }


def _unlearn(task: Task, setting: Setting) -> dict[str, Any]:
    """Run one method on an original model, and measure it beside the retrained ones."""
    params, view = task.params, view_of(task.params, setting)
    [original] = task.needs["original"]
    model = _fresh(params, view, setting, params["seed"])
    load_weights(model, setting.of(original) / WEIGHTS)
    references = [
        measure.load_outputs(setting.of(reference) / OUTPUTS)
        for reference in task.needs["references"]
    ]
    before = measure.load_outputs(setting.of(original) / OUTPUTS)
    incompetent = outputs(
        _fresh(params, view, setting, params["seed"] + 1), view.test_forget, params["batch_size"]
    )

    def measured(found: dict[str, Outputs]) -> dict[str, float | None]:
        return measure.metrics(found, references, incompetent)

    edited: dict[str, float | None] | None = None

    def on_epoch(record: EpochRecord) -> None:
        nonlocal edited
        history.append(dataclasses.asdict(record))
        if record.stage == "masked":
            edited = measured(all_outputs(model, view, recipe, params["batch_size"]))

    samples = params["remain_samples"]
    remain: Dataset[Any] | None = view.remain
    if samples == 0:
        remain = None
    elif samples is not None:
        remain = part_of(view.remain, samples, seed=params["seed"])
    recipe = TrainRecipe.from_dict(params["train"])
    history: list[dict[str, Any]] = []
    scores = Scores(setting.folder / "scores")
    try:
        result = unlearn(
            model,
            view.forget,
            remain,
            method=params["method"],
            options=params["options"],
            ratio=params["ratio"],
            remain_weight=params["remain_weight"],
            granularity=params["granularity"],
            scope=params["scope"],
            exclude=params["exclude"],
            epochs=params["epochs"],
            recipe=recipe,
            replay_epochs=params["replay_epochs"],
            test_forget=view.test_forget,
            test_remain=view.test_remain,
            train_accuracies=False,
            batch_size=params["batch_size"],
            seed=params["seed"],
            scores=scores,
            on_epoch=on_epoch,
        )
    except FloatingPointError as error:
        # A method that diverges has failed here, and the others go on.
        return {**dict.fromkeys(OF_A_RUN), "history": history, "failed": str(error)}
    found = all_outputs(model, view, recipe, params["batch_size"])
    measure.save_outputs(setting.of(task) / OUTPUTS, found)
    final = measured(found)
    start = time.perf_counter()
    if params["relearn_epochs"]:
        final |= _relearned(model, view, before["train_forget"], params)
    return {
        "failed": None,
        "history": history,
        "original": measured(before),
        "edited": edited,
        "final": final,
        "confusion_shift": measure.confusion_shift(found, references),
        "chosen": result.chosen,
        "search": result.search,
        "mask": None
        if result.mask is None
        else {"units": result.mask.units, "k": result.mask.k, "zeroed": result.mask.zeroed},
        "seconds": {
            # As if it had run alone.
            "edit": sum(r["seconds"] for r in history if r["stage"] == "masked")
            + scores.seconds_saved,
            "fit": sum(r["seconds"] for r in history if r["stage"] == "epoch"),
            "relearn": time.perf_counter() - start,
        },
    }


def _relearn(task: Task, setting: Setting) -> dict[str, Any]:
    """Relearn time of a retrained model, to see that of the others beside it."""
    params, view = task.params, view_of(task.params, setting)
    [original], [retrained] = task.needs["original"], task.needs["retrained"]
    model = _fresh(params, view, setting, params["seed"])
    load_weights(model, setting.of(retrained) / WEIGHTS)
    before = measure.load_outputs(setting.of(original) / OUTPUTS)["train_forget"]
    return dict(_relearned(model, view, before, params))


def _relearned(
    model: nn.Module, view: View, before: Outputs, params: dict[str, Any]
) -> dict[str, float | None]:
    """Epochs until D_f is known again, and whether that was so within the limit."""
    found = relearn_epochs(
        model,
        view.forget,
        view.train,
        float(before.losses.mean()),
        max_epochs=params["relearn_epochs"],
        batch_size=params["batch_size"],
        seed=params["seed"],
    )
    return {"relearn_epochs": float(found.epochs), "relearn_reached": float(found.reached)}


def all_outputs(
    model: nn.Module,
    view: View,
    recipe: TrainRecipe,
    batch_size: int,
    extra: dict[str, Dataset[Any]] | None = None,
) -> dict[str, Outputs]:
    """What a model says of the sets that metrics look at."""
    sets = {
        "train_forget": view.forget,
        "train_remain": part_of(view.remain, _REMAIN_SAMPLES, seed=0),
        "test_forget": view.test_forget,
        "test_remain": view.test_remain,
        **(extra or {}),
    }
    with recipe.autocast(device_of(model)):
        return {name: outputs(model, dataset, batch_size) for name, dataset in sets.items()}


def _fresh(params: dict[str, Any], view: View, setting: Setting, seed: int) -> nn.Module:
    device = torch.device(setting.device)
    with seeded(seed, device):
        model = models.build(
            params["model"],
            num_classes=view.bundle.num_classes,
            in_channels=view.bundle.in_channels,
            image_size=view.bundle.image_size,
        )
    return model.to(device)
