"""``unlearn``: evaluate, edit, fine-tune, and evaluate after every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

from torch import nn
from torch.utils.data import Dataset

from ..data import batches, size_of
from ..masking import Granularity, Scope, check_scope
from .base import Edit, Job, Method, methods
from .loop import EpochStats, seeded
from .metrics import accuracy, device_of, keeping_modes
from .recipe import TrainRecipe, check_integer
from .result import EpochRecord, UnlearnResult
from .scores import Scores
from .search import scope_name


def unlearn(
    model: nn.Module,
    forget_set: Dataset[Any],
    remain_set: Dataset[Any] | None,
    *,
    method: str = "fisher-mask",
    options: Mapping[str, Any] | None = None,
    ratio: float = 0.02,
    remain_weight: float | Literal["auto"] = 1.0,
    granularity: Granularity = "parameter",
    exclude: Sequence[str] = (),
    scope: Scope = "global",
    epochs: int = 5,
    recipe: TrainRecipe | None = None,
    replay_epochs: int = 5,
    test_forget: Dataset[Any] | None = None,
    test_remain: Dataset[Any] | None = None,
    train_accuracies: bool = True,
    batch_size: int = 128,
    seed: int = 0,
    model_factory: Callable[[], nn.Module] | None = None,
    scores: Scores | None = None,
    progress: bool = False,
    on_epoch: Callable[[EpochRecord], object] | None = None,
) -> UnlearnResult:
    """Make a trained classifier forget part of its training data.

    "fisher-mask" zeroes the ``ratio`` of the weights with the largest ``F_f - w F_r`` and
    fine-tunes on the remain set; "random-mask" zeroes as many at random; "finetune" only
    fine-tunes; "retrain" trains a fresh model on the remain set by the whole recipe, the
    reference. Fine-tuning replays the recipe's learning-rate curve within ``replay_epochs`` epochs
    (paper, section 3.4). All arguments are checked before the model is touched, and the caller's
    random numbers are not disturbed.

    Args:
        model: from inputs ``[B, ...]`` to logits ``[B, C]``; modified in place, except by
            "retrain".
        forget_set: D_f, training samples to forget; map-style, of (input, target).
        remain_set: D_r, the other training samples; ``None`` if none is at hand, which some methods
            can do with as long as ``epochs`` is 0 (paper, section 4.3).
        method: a name in :func:`fastfisher.unlearning.methods`.
        options: hyper-parameters of the method's own, by name: the fields of its ``Options``.
        ratio: R, the fraction of units that a masking method zeroes.
        remain_weight: w of the score, with Fishers averaged over samples; or "auto": w, R, unit and
            scope are searched on training images that the Fishers then do not see
            (:func:`fastfisher.unlearning.search_mask`). ``ratio`` is one of the candidates;
            ``granularity`` and ``scope`` are searched where they are left at their defaults.
        granularity: as in :func:`fastfisher.fisher_mask_`; "random-mask" also takes "channel".
            Of "fisher-mask" and "random-mask"; a method that scores channels masks channels.
        exclude: as in :func:`fastfisher.fisher_mask_`.
        scope: as in :func:`fastfisher.fisher_mask_`: of what the ratio is taken, all parameters
            together, each layer, or groups of your own. "random-mask" draws within the same groups.
        epochs: of fine-tuning; 0 only masks. "retrain" runs ``recipe.epochs``.
        recipe: how the original model was trained; fine-tuning takes everything but the number of
            epochs and the seed from it. Default: the paper's for CIFAR; "retrain" needs one.
        replay_epochs: S, the epochs into which the learning-rate curve is compressed.
        test_forget: test samples of what is to be forgotten; only evaluated.
        test_remain: the other test samples; only evaluated.
        train_accuracies: evaluate the training sets at every stage, too.
        batch_size: of scoring and evaluation; training uses the recipe's.
        seed: of the random mask, the held-out images, the order of the samples, augmentation,
            dropout and the fresh model.
        model_factory: makes a freshly initialised model, for "retrain".
        scores: where Fishers and other scores come from, such as a
            :class:`fastfisher.unlearning.Scores` of a folder, which remembers them.
        progress: show progress bars, if the standard error is a terminal.
        on_epoch: called with each record as soon as it is there, the first two stages included.

    Returns:
        The history of accuracies, the mask, and the model (the same object, or the fresh one).

    Raises:
        ValueError: an argument is out of range, missing or unknown; the message names it.
        TypeError: an argument is of the wrong type.
        FloatingPointError: the loss stopped being finite while fine-tuning.
    """
    chosen_method = _check_method(method)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    _check_numbers(ratio, remain_weight, epochs, replay_epochs, batch_size, seed)
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"granularity: expected one of {get_args(Granularity)}, got {granularity!r}"
        )
    if isinstance(exclude, str):
        raise TypeError(f"exclude: expected a sequence of names, got the string {exclude!r}")
    check_scope(scope)
    if recipe is not None and not isinstance(recipe, TrainRecipe):
        raise TypeError(f"recipe: expected a TrainRecipe, got {type(recipe).__name__}")
    for name, function in (("model_factory", model_factory), ("on_epoch", on_epoch)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
    datasets: dict[str, Dataset[Any] | None] = {
        "train_forget": forget_set,
        "train_remain": remain_set,
        "test_forget": test_forget,
        "test_remain": test_remain,
    }
    sizes = _check_sizes(datasets)
    if remain_set is None and (epochs or chosen_method.needs_remain_set):
        needed = f"{method!r} needs one" if chosen_method.needs_remain_set else "epochs is not 0"
        raise ValueError(f"remain_set: expected a data set, got None, and {needed}")
    if scores is not None and not isinstance(scores, Scores):
        raise TypeError(f"scores: expected Scores, got {type(scores).__name__}")
    job = Job(
        model=model,
        forget_set=forget_set,
        remain_set=remain_set,
        ratio=ratio,
        remain_weight=remain_weight,
        granularity=granularity,
        exclude=tuple(exclude),
        scope=scope,
        epochs=epochs,
        replay_epochs=replay_epochs,
        recipe=recipe,
        batch_size=batch_size,
        seed=seed,
        model_factory=model_factory,
        progress=progress,
        options=chosen_method.options({} if options is None else options),
        scores=Scores() if scores is None else scores,
    )
    chosen_method.check(job)
    train_recipe = chosen_method.recipe(job)
    history: list[EpochRecord] = []

    def record(
        stage: Literal["original", "masked", "epoch"],
        subject: nn.Module,
        seconds: float,
        stats: EpochStats | None = None,
    ) -> None:
        with train_recipe.autocast(device_of(subject)):
            values = {
                name: accuracy(subject, batches(dataset, batch_size))
                if dataset is not None and (train_accuracies or name.startswith("test"))
                else None
                for name, dataset in datasets.items()
            }
        history.append(
            EpochRecord(
                stage=stage,
                epoch=stats.epoch if stats else 0,
                lr=stats.lr if stats else None,
                loss=stats.loss if stats else None,
                seconds=seconds,
                **values,
            )
        )
        if on_epoch is not None:
            on_epoch(history[-1])

    with seeded(seed, device_of(model)), keeping_modes(model):
        record("original", model, 0.0)
        edit, seconds = _timed_edit(chosen_method, job)
        if chosen_method.edits_weights:
            record("masked", edit.model, seconds)
        run_epochs, schedule_epochs = chosen_method.epochs(job)
        chosen_method.fit(
            job, edit.model, lambda stats: record("epoch", edit.model, stats.seconds, stats)
        )
    config = {
        "method": method,
        "options": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(job.options).items()
        },
        "ratio": ratio,
        "remain_weight": remain_weight,
        "granularity": granularity,
        "exclude": list(exclude),
        "scope": scope_name(scope),
        "epochs": run_epochs,
        "replay_epochs": schedule_epochs,
        "recipe": train_recipe.to_dict(),
        "batch_size": batch_size,
        "seed": seed,
        "samples": sizes,
    }
    return UnlearnResult(method, config, history, edit.model, edit.mask, edit.search)


def _check_method(name: str) -> Method:
    known = methods()
    if name not in known:
        raise ValueError(f"method: expected one of {sorted(known)}, got {name!r}")
    return known[name]


def _check_numbers(
    ratio: float,
    remain_weight: float | Literal["auto"],
    epochs: int,
    replay_epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    check_integer("epochs", epochs, 0)
    check_integer("replay_epochs", replay_epochs, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"ratio: expected a number, got {ratio!r}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: must be in [0, 1], got {ratio!r}")
    if remain_weight == "auto":
        return
    if isinstance(remain_weight, bool) or not isinstance(remain_weight, int | float):
        raise TypeError(f'remain_weight: expected a number or "auto", got {remain_weight!r}')
    if not 0 <= remain_weight < math.inf:
        raise ValueError(f"remain_weight: must be finite and not negative, got {remain_weight!r}")


def _check_sizes(datasets: dict[str, Dataset[Any] | None]) -> dict[str, int]:
    arguments = {"train_forget": "forget_set", "train_remain": "remain_set"}
    sizes = {}
    for name, dataset in datasets.items():
        argument = arguments.get(name, name)
        if dataset is None:
            if name == "train_forget":
                raise TypeError(f"{argument}: expected a data set, got None")
            continue
        try:
            sizes[name] = size_of(dataset)
        except TypeError as error:
            raise TypeError(f"{argument}: {error}") from None
        if sizes[name] == 0:
            raise ValueError(f"{argument}: expected at least one sample")
    return sizes


def _timed_edit(method: Method, job: Job) -> tuple[Edit, float]:
    start = time.perf_counter()
    edit = method.edit(job)
    return edit, time.perf_counter() - start
