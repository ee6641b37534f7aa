"""Scores of parameters and channels, computed once for the same weights, data and definition."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data import batches
from ..files import replacing
from ..fisher_diag import FisherDiag, fisher_diag
from ..runs import write_json

_BATCH = 1024


class Scores:
    """Computes scores, and remembers them in a folder if there is one.

    A file's name is the hash of all that its values follow from: the weights and buffers of the
    model, every input and target of the data in order, and the definition. So methods, ratios and
    experiments share what they have in common, and nothing stale is ever used.

    Attributes:
        seconds_saved: what the scores that were found in the folder took when they were computed,
            in all: a method's time with them is longer than it seems by as much.

    Args:
        folder: where to remember; made where it does not exist. ``None`` remembers nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self.seconds_saved = 0.0
        self._hashes: dict[int, tuple[Dataset[Any], str]] = {}

    def fisher(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        progress: bool = False,
        **options: Any,
    ) -> FisherDiag:
        """:func:`fastfisher.fisher_diag` of a data set.

        Args:
            model: as of it.
            dataset: map-style, of (input, target).
            batch_size: samples a pass; no part of the definition, results do not depend on it
                beyond rounding.
            progress: as of it.
            options: its other arguments, JSON-able.

        Raises:
            ValueError: as :func:`fastfisher.fisher_diag`.
        """

        def compute() -> FisherDiag:
            return fisher_diag(model, batches(dataset, batch_size), progress=progress, **options)

        path = self._path(model, dataset, {"score": "fisher_diag", **options})
        if path is None:
            return compute()
        self._remember(path, lambda: compute().save(path))
        return FisherDiag.load(path)

    def tensors(
        self,
        model: nn.Module,
        dataset: Dataset[Any],
        definition: Mapping[str, Any],
        compute: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """What ``compute`` returns, from the folder if it has been computed before.

        Args:
            model: that the score is of.
            dataset: that the score is of.
            definition: all else that the score follows from, JSON-able.
            compute: from nothing to tensors by name.
        """
        from safetensors.torch import load_file, save_file

        path = self._path(model, dataset, definition)
        if path is None:
            return dict(compute())

        def save() -> None:
            values = {name: value.contiguous() for name, value in compute().items()}
            with replacing(path) as temporary:
                save_file(values, temporary)

        self._remember(path, save)
        return load_file(path)

    def _remember(self, path: Path, save: Callable[[], None]) -> None:
        """Make the file if it is not there, and count the time that it saves if it is."""
        beside = path.with_suffix(".json")
        if path.is_file() and beside.is_file():
            self.seconds_saved += json.loads(beside.read_text(encoding="utf-8"))["seconds"]
            return
        start = time.perf_counter()
        save()
        write_json(beside, {"seconds": time.perf_counter() - start})

    def _path(
        self, model: nn.Module, dataset: Dataset[Any], definition: Mapping[str, Any]
    ) -> Path | None:
        if self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode())
        digest.update(self._of_dataset(dataset).encode())
        for name, value in model.state_dict().items():
            _update(digest, name, value)
        return self._folder / f"{digest.hexdigest()[:32]}.safetensors"

    def _of_dataset(self, dataset: Dataset[Any]) -> str:
        # A data set is read once; the reference kept here keeps its id from being used again.
        if id(dataset) not in self._hashes:
            digest = hashlib.sha256()
            for inputs, targets in batches(dataset, _BATCH):
                _update(digest, "inputs", inputs)
                _update(digest, "targets", targets)
            self._hashes[id(dataset)] = dataset, digest.hexdigest()
        return self._hashes[id(dataset)][1]


def _update(digest: Any, name: str, value: Tensor) -> None:
    plain = value.detach().cpu().contiguous()
    digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy())
