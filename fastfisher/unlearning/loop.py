"""The training loop, for original models, retrained references and fine-tuning alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data import batches
from .metrics import device_of, keeping_modes
from .recipe import TrainRecipe, check_integer
from .schedule import lr_scheduler

Objective: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
_SHIFT = 4


@dataclass(frozen=True)
class EpochStats:
    """One epoch of training.

    Attributes:
        epoch: counted from 1.
        lr: learning rate of the epoch's last step.
        loss: mean training loss over the epoch's samples.
        seconds: time of the epoch.
    """

    epoch: int
    lr: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Prelude:
    """Steps on another data set before those of each of the first epochs, by the same optimizer.

    They are taken at the learning rate of the epoch's first step, and the schedule does not count
    them.

    Attributes:
        dataset: map-style, of (input, target).
        objective: as that of :func:`train`.
        epochs: in how many epochs.
    """

    dataset: Dataset[Any]
    objective: Objective
    epochs: int


def train(
    model: nn.Module,
    dataset: Dataset[Any],
    recipe: TrainRecipe,
    *,
    epochs: int | None = None,
    schedule_epochs: int | None = None,
    seed: int | None = None,
    objective: Objective = lambda model, inputs, targets: F.cross_entropy(model(inputs), targets),
    prelude: Prelude | None = None,
    before_step: Callable[[], object] | None = None,
    after_step: Callable[[], object] | None = None,
    on_epoch: Callable[[EpochStats], object] | None = None,
    progress: bool = False,
) -> list[EpochStats]:
    """Train in place with a fresh SGD optimizer and the recipe's schedule.

    All parameters that require grad are trained, in train mode; modes and memory format are given
    back at the end. The caller's random numbers are not disturbed.

    Args:
        model: any module from inputs ``[B, ...]`` to logits ``[B, C]``.
        dataset: map-style, of (input, target).
        recipe: hyper-parameters.
        epochs: how many to run, at least 1; default ``recipe.epochs``.
        schedule_epochs: epochs onto which the learning-rate curve is compressed; default
            ``recipe.epochs``. Later epochs stay at the last rate. 5 is the replay of the paper's
            section 3.4.
        seed: instead of ``recipe.seed``.
        objective: the loss of a batch, from the model, inputs ``[B, ...]`` and targets ``[B]``, a
            scalar to minimise; by default the mean cross entropy.
        prelude: what else to train on, at the start of the first epochs.
        before_step: called between each backward pass and its step, to change gradients.
        after_step: called after each step, to change weights.
        on_epoch: called after each epoch.
        progress: show a bar, if the standard error is a terminal.

    Returns:
        One record an epoch.

    Raises:
        ValueError: an argument is out of range, or nothing can be trained.
        TypeError: an argument is of the wrong type.
        FloatingPointError: the loss stopped being finite; the weights are those before that step.
    """
    if not isinstance(recipe, TrainRecipe):
        raise TypeError(f"recipe: expected a TrainRecipe, got {type(recipe).__name__}")
    epochs = recipe.epochs if epochs is None else epochs
    schedule_epochs = recipe.epochs if schedule_epochs is None else schedule_epochs
    seed = recipe.seed if seed is None else seed
    check_integer("epochs", epochs, 1)
    check_integer("schedule_epochs", schedule_epochs, 1)
    check_integer("seed", seed, 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires grad, nothing can be trained")
    if recipe.augment and dataset[0][0].ndim != 3:
        raise ValueError("recipe.augment: inputs must be images [C, H, W]")
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    loader = batches(dataset, recipe.batch_size, shuffle=True, generator=generator)
    optimizer = torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    scheduler = lr_scheduler(
        optimizer, recipe, steps_per_epoch=len(loader), schedule_epochs=schedule_epochs
    )
    last_scheduled = schedule_epochs * len(loader) - 1

    def learn(
        epoch: int, inputs: Tensor, targets: Tensor, objective: Objective
    ) -> tuple[float, float]:
        """Take one step; returns the loss before it and the learning rate."""
        if recipe.augment:
            inputs = shift_and_mirror(inputs, generator)
        if recipe.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with recipe.autocast(device):
            loss = objective(model, inputs.to(device), targets.to(device))
        value = loss.item()
        lr = float(scheduler.get_last_lr()[0])
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the training loss became {value} in epoch {epoch} (learning rate "
                f"{lr:g}); lower the learning rate or look for bad inputs"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if before_step is not None:
            before_step()
        optimizer.step()
        if after_step is not None:
            after_step()
        return value, lr

    stats: list[EpochStats] = []
    step = 0
    bar = _progress_bar(epochs * len(loader), progress)
    with bar, seeded(seed, device), keeping_modes(model), _channels_last(model, recipe):
        model.train()
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            total_loss, samples = 0.0, 0
            if prelude is not None and epoch <= prelude.epochs:
                for inputs, targets in batches(
                    prelude.dataset, recipe.batch_size, shuffle=True, generator=generator
                ):
                    learn(epoch, inputs, targets, prelude.objective)
            for inputs, targets in loader:
                value, lr = learn(epoch, inputs, targets, objective)
                if step < last_scheduled:
                    scheduler.step()
                step += 1
                total_loss += value * len(targets)
                samples += len(targets)
                bar.update(1)
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - start
            stats.append(EpochStats(epoch, lr, total_loss / samples, seconds))
            bar.set_postfix(epoch=epoch, loss=f"{stats[-1].loss:.3f}", lr=f"{lr:.2g}")
            if on_epoch is not None:
                on_epoch(stats[-1])
    return stats


def shift_and_mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by -4 .. 4 pixels in both directions and mirror half of them.

    What moves in is zero: for normalised images, the mean colour.

    Args:
        images: ``[N, C, H, W]``; not modified.
        generator: source of the shifts, on the CPU.

    Returns:
        ``[N, C, H, W]``, new.
    """
    count, _, height, width = images.shape
    shifts = torch.randint(0, 2 * _SHIFT + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (_SHIFT,) * 4)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, of the CPU and of ``device``; restore them at the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for used in devices:
            with torch.cuda.device(used):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _channels_last(model: nn.Module, recipe: TrainRecipe) -> Iterator[None]:
    """Hold 4-D parameters and buffers in the recipe's memory format; restore each one's own."""
    if not recipe.channels_last:
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    was_contiguous = [t.is_contiguous() for t in tensors]
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, contiguous in zip(
                [*model.parameters(), *model.buffers()], was_contiguous, strict=True
            ):
                if contiguous and not tensor.is_contiguous():
                    tensor.data = tensor.data.contiguous()


def _progress_bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="train", unit="step", disable=None if progress else True)
