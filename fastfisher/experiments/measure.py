"""The metrics of a model's outputs, beside those of retrained models, and outputs on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ..files import replacing
from ..metrics.attack_quality import attack_quality
from ..metrics.distance import (
    activation_distance,
    class_confusion,
    confusion_distance,
    js_divergence,
    prediction_distance,
    zrf,
)
from ..metrics.likelihood import rmia
from ..metrics.membership import Statistic, fit_thresholds
from ..metrics.outputs import Outputs
from ..metrics.summary import average_gap, tug_of_war

#: Outputs of one model for the sets that metrics look at, by name.
Found = Mapping[str, Outputs]
Metrics = dict[str, float | None]
_ATTACKS: dict[str, Statistic] = {
    "mia_confidence": "confidence",
    "mia_entropy": "modified_entropy",
}


def metrics(found: Found, references: Sequence[Found], incompetent: Outputs | None) -> Metrics:
    """All metrics of one model.

    Args:
        found: "train_forget", "train_remain" (or a part of it), "test_forget", "test_remain".
        references: the same of retrained models; the mean over them is taken of what compares two
            models. Without one, such metrics are ``None``.
        incompetent: of a randomly initialised model, for "test_forget"; ``None`` leaves out ZRF.
    """
    values: Metrics = {name: each.accuracy for name, each in found.items()}
    for name, statistic in _ATTACKS.items():
        values[name] = _called_nonmembers(found, statistic)
    values["zrf"] = None
    if incompetent is not None:
        values["zrf"] = zrf(found["test_forget"].probabilities, incompetent.probabilities)

    def mean(compare: Callable[[Found], float]) -> float | None:
        return fmean(map(compare, references)) if references else None

    for part in ("forget", "remain"):
        name = f"test_{part}"

        def js(other: Found, name: str = name) -> float:
            return js_divergence(found[name].probabilities, other[name].probabilities)

        def activation(other: Found, name: str = name) -> float:
            return activation_distance(found[name].probabilities, other[name].probabilities)

        values[f"js_{part}"] = mean(js)
        values[f"activation_distance_{part}"] = mean(activation)
    values["prediction_distance"] = mean(
        lambda other: prediction_distance(found["test_forget"], other["test_forget"])
    )
    values["confusion_distance"] = mean(
        lambda other: float(confusion_distance(_test(found), _test(other)).nanmean())
    )
    values["rmia_auc"] = rmia_auc(found, references) if references else None
    away = {
        name: None
        if (of := mean(lambda other, n=name: other[n].accuracy)) is None  # type: ignore[misc]
        else found[name].accuracy - of
        for name in found
    }
    called = mean(lambda other: _called_nonmembers(other, "confidence"))
    values["tug_of_war"] = values["average_gap"] = None
    forget, remain, test = (away[n] for n in ("train_forget", "train_remain", "test_remain"))
    confidence = values["mia_confidence"]
    if forget is not None and remain is not None and test is not None and called is not None:
        assert confidence is not None
        values["tug_of_war"] = tug_of_war(forget=forget, remain=remain, test=test)
        values["average_gap"] = average_gap(
            unlearning=-forget, remain=remain, test=test, membership=confidence - called
        )
    return values


def confusion_shift(found: Found, references: Sequence[Found]) -> list[list[float]] | None:
    """Class confusion on the test samples minus the mean of the retrained models', ``[C, C]``."""
    if not references:
        return None
    others = torch.stack([class_confusion(_test(other)) for other in references]).mean(0)
    shift: list[list[float]] = (class_confusion(_test(found)) - others).tolist()
    return shift


def save_outputs(path: Path, found: Found) -> None:
    """Write outputs as one safetensors file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, each in found.items():
        tensors[f"logits:{name}"] = each.logits.contiguous()
        tensors[f"targets:{name}"] = each.targets.contiguous()
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def load_outputs(path: Path) -> dict[str, Outputs]:
    """Read what :func:`save_outputs` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = [key.partition(":")[2] for key in tensors if key.startswith("logits:")]
    return {name: Outputs(tensors[f"logits:{name}"], tensors[f"targets:{name}"]) for name in names}


def _called_nonmembers(found: Found, statistic: Statistic) -> float:
    """Fraction of D_f that a threshold attack, fitted on the remaining data, calls non-members.

    One threshold for all classes, since no sample of a removed class is there to fit one.
    """
    attack = fit_thresholds(found["train_remain"], found["test_remain"], statistic, per_class=False)
    return 1 - float(attack.predict(found["train_forget"]).double().mean())


def rmia_auc(found: Found, references: Sequence[Found]) -> float:
    """How well RMIA tells D_f from test samples of its kind; the references saw neither."""

    def logs(each: Found, name: str) -> Tensor:
        return -each[name].losses

    def of_references(name: str) -> Tensor:
        return torch.stack([logs(other, name) for other in references])

    population = logs(found, "test_remain"), of_references("test_remain")
    scores = [
        rmia(logs(found, name), of_references(name), *population)
        for name in ("train_forget", "test_forget")
    ]
    members = torch.arange(sum(map(len, scores))) < len(scores[0])
    return attack_quality(torch.cat(scores), members).auc


def _test(found: Found) -> Outputs:
    parts = [found["test_forget"], found["test_remain"]]
    return Outputs(
        torch.cat([part.logits for part in parts]), torch.cat([part.targets for part in parts])
    )
