"""The samples of an experiment: what is trained on, forgotten, kept and tested."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from ..data import (
    DataBundle,
    batches,
    load_dataset,
    size_of,
    split_forget,
    stratified,
    subset,
    targets_of,
)
from .engine import Setting

_BATCH = 1024


@dataclass(frozen=True)
class View:
    """Data sets of one experiment.

    Attributes:
        bundle: all of the data set.
        train: what the original model is trained on.
        forget: D_f.
        remain: D_r.
        test_forget: test samples of the class that is removed; or, of outliers, the removed
            training samples with their correct labels (paper, section 4.2).
        test_remain: the other test samples; or, of outliers, all.
    """

    bundle: DataBundle
    train: Dataset[Any]
    forget: Dataset[Any]
    remain: Dataset[Any]
    test_forget: Dataset[Any]
    test_remain: Dataset[Any]


def view_of(params: Mapping[str, Any], setting: Setting) -> View:
    """The data sets that a task's parameters describe; read once a process.

    Raises:
        ValueError: the data set does not have the class, or not so many samples.
        FileNotFoundError: the data set is not there.
        ConnectionError: it could not be downloaded.
    """
    return _view(
        json.dumps(params["data"], sort_keys=True),
        setting.data_root,
        setting.download,
        params["forget_class"],
        params["noise"],
        params["noise_seed"],
    )


@functools.lru_cache(maxsize=2)
def _view(
    data: str,
    data_root: Path | None,
    download: bool,
    forget_class: int,
    noise: float | None,
    noise_seed: int | None,
) -> View:
    bundle = _bundle(data, data_root, download)
    if noise is None:
        forget, remain = split_forget(bundle.train, forget_class=forget_class)
        test_forget, test_remain = split_forget(bundle.test, forget_class=forget_class)
        return View(bundle, bundle.train, forget, remain, test_forget, test_remain)
    generator = torch.Generator().manual_seed(noise_seed or 0)
    total = size_of(bundle.train)
    order = torch.randperm(total, generator=generator)
    chosen = order[: int(noise * total)].sort().values
    true = targets_of(bundle.train)
    noisy = true.clone()
    # Of all classes, as the authors': a tenth of ten classes' labels stay correct.
    noisy[chosen] = torch.randint(bundle.num_classes, chosen.shape, generator=generator)
    inputs = torch.cat([inputs for inputs, _ in batches(bundle.train, _BATCH)])
    train = TensorDataset(inputs, noisy)
    forget, remain = split_forget(train, indices=chosen.tolist())
    corrected = subset(TensorDataset(inputs, true), chosen)
    return View(bundle, train, forget, remain, corrected, bundle.test)


@functools.lru_cache(maxsize=1)
def _bundle(data: str, data_root: Path | None, download: bool) -> DataBundle:
    part = json.loads(data)
    bundle = load_dataset(part["name"], data_root, download=download, image_size=part["image_size"])
    return DataBundle(
        **{
            **{name: getattr(bundle, name) for name in DataBundle.__dataclass_fields__},
            "train": _part(bundle.train, part["train_samples"], "data.train_samples"),
            "test": _part(bundle.test, part["test_samples"], "data.test_samples"),
        }
    )


def _part(dataset: Dataset[Any], count: int, name: str) -> Dataset[Any]:
    if count > size_of(dataset):
        raise ValueError(f"{name}: there are {size_of(dataset)} samples, not {count}")
    return part_of(dataset, count, seed=0) if count else dataset


def part_of(dataset: Dataset[Any], count: int, *, seed: int) -> Dataset[Any]:
    """Samples drawn at random, each class in proportion, in the data set's order.

    Args:
        dataset: map-style, of (input, target).
        count: how many; all of them where there are no more.
        seed: of the draw.
    """
    if count >= size_of(dataset):
        return dataset
    generator = torch.Generator().manual_seed(seed)
    return subset(dataset, stratified(targets_of(dataset), count, generator))
