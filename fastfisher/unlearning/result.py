"""What an unlearning run found, in memory and on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..masking import Mask
from ..runs import WEIGHTS, load_weights, save_weights, write_json

RESULT = "result.json"
MASK = "mask.safetensors"
_FORMAT = "fastfisher.unlearn/2"


@dataclass(frozen=True)
class EpochRecord:
    """Accuracies at one point of a run, in [0, 1]; ``None`` where there was nothing to measure.

    Attributes:
        stage: "original", before anything; "masked", after masking and before fine-tuning; or
            "epoch", after an epoch of training.
        epoch: counted from 1; 0 for the other stages.
        lr: learning rate of the epoch's last step.
        seconds: time that scoring and masking, or the epoch's training, took; not the evaluation.
        train_forget: accuracy on the forget set.
        train_remain: accuracy on the remain set.
        test_forget: accuracy on test samples of what is to be forgotten.
        test_remain: accuracy on the other test samples.
        loss: mean training loss of the epoch.
    """

    stage: Literal["original", "masked", "epoch"]
    epoch: int
    lr: float | None
    seconds: float
    train_forget: float | None
    train_remain: float | None
    test_forget: float | None
    test_remain: float | None
    loss: float | None


@dataclass
class UnlearnResult:
    """Result of :func:`fastfisher.unlearn`.

    Attributes:
        method: its name.
        config: the arguments of the call, and the sizes of the data sets, as JSON-able values.
        history: one record per stage, in order of time.
        model: the model at the end; ``None`` if the result was loaded without one.
        mask: which weights were zeroed; ``None`` for a method that masks nothing.
        search: of ``remain_weight="auto"``: every candidate with its held-out accuracies, the
            Pareto curve and the choice; the fields of :class:`fastfisher.unlearning.Search`.
    """

    method: str
    config: dict[str, Any]
    history: list[EpochRecord]
    model: nn.Module | None
    mask: Mask | None = None
    search: dict[str, Any] | None = None

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The candidate that the search chose, if there was one."""
        return None if self.search is None else self.search["chosen"]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON-able values."""
        return {
            "format": _FORMAT,
            "method": self.method,
            "config": self.config,
            "history": [dataclasses.asdict(record) for record in self.history],
            "search": self.search,
        }

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``result.json``, ``model.safetensors`` and, with a mask, ``mask.safetensors``.

        Each file appears whole or not at all; ``result.json`` comes last.

        Args:
            directory: made where it does not exist.

        Raises:
            ValueError: the result has no model.
        """
        if self.model is None:
            raise ValueError("model: a result that was loaded without a model cannot be saved")
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, folder / WEIGHTS)
        if self.mask is None:
            (folder / MASK).unlink(missing_ok=True)
        else:
            self.mask.save(folder / MASK)
        write_json(folder / RESULT, self.to_dict())

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model: nn.Module | None = None
    ) -> UnlearnResult:
        """Read what :meth:`save` wrote.

        Args:
            directory: the folder.
            model: one of the same architecture; the weights are loaded into it. Without it the
                result has no model.

        Raises:
            FileNotFoundError: there is no result in ``directory``.
            ValueError: its files are damaged, or hold the weights of another architecture.
        """
        folder = Path(directory)
        path = folder / RESULT
        if not path.is_file():
            raise FileNotFoundError(f"directory: no {RESULT} in {str(folder)!r}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"{path} was not written by this version of fastfisher")
        history = [EpochRecord(**record) for record in values["history"]]
        mask = Mask.load(folder / MASK) if (folder / MASK).is_file() else None
        if model is not None:
            load_weights(model, folder / WEIGHTS)
        return cls(values["method"], values["config"], history, model, mask, values["search"])
