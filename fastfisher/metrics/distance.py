"""How far the answers of two models are apart; the second is usually the retrained one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .outputs import Outputs, check_same_samples

_SUM_TOLERANCE = 1e-4  # of float32 probabilities over a thousand classes, with room


def js_divergences(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each sample.

    ``JS = (KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, in nats: from 0 for equal
    distributions to ``log 2`` for disjoint ones; symmetric (Lin 1991).

    Args:
        p: probabilities, ``[N, C]``.
        q: probabilities, ``[N, C]``.

    Returns:
        ``[N]`` float64.

    Raises:
        ValueError: shapes differ, or rows are no probabilities.
    """
    p, q = _distributions(p, q)
    middle = (p + q) / 2
    # Where both are 0 the term is 0; the ratio must then only not be 0 / 0.
    safe = middle.where(middle > 0, 1.0)
    terms = torch.xlogy(p, p / safe) + torch.xlogy(q, q / safe)
    return terms.sum(1).clamp_min(0) / 2


def js_divergence(p: Tensor, q: Tensor) -> float:
    """Mean of :func:`js_divergences` over the samples, in [0, log 2]; lower is closer."""
    return float(js_divergences(p, q).mean())


def zrf(probabilities: Tensor, incompetent: Tensor) -> float:
    """Zero retrain forgetting (Chundawat et al. 2023): ``1 - mean JS`` on the forget set.

    In nats: from ``1 - log 2 = 0.307`` to 1; 1 is a model that answers to the forget set as the
    incompetent one does. Compare it with the score of retrained models: higher is not better
    without end.

    Args:
        probabilities: of the unlearned model, ``[N, C]``.
        incompetent: of a randomly initialised model, for the same samples, ``[N, C]``.

    Raises:
        ValueError: shapes differ, or rows are no probabilities.
    """
    return 1 - js_divergence(probabilities, incompetent)


def activation_distance(p: Tensor, q: Tensor, norm: Literal["l1", "l2"] = "l1") -> float:
    """Mean over the samples of ``|| p_i - q_i ||``, of softmax outputs.

    "l1" is Golatkar et al.'s (2020, readout functions), in [0, 2]; "l2" that of Foster et al.
    (SSD, 2024), in [0, sqrt 2]. Lower is closer.

    Args:
        p: probabilities, ``[N, C]``.
        q: probabilities of the other model for the same samples, ``[N, C]``.
        norm: which one.

    Raises:
        ValueError: shapes differ, rows are no probabilities, or an unknown ``norm``.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm: expected 'l1' or 'l2', got {norm!r}")
    p, q = _distributions(p, q)
    return float(torch.linalg.vector_norm(p - q, 1 if norm == "l1" else 2, dim=1).mean())


def prediction_distance(method: Outputs, reference: Outputs) -> float:
    """``mean_i | err_i(method) - err_i(reference) |`` with ``err`` 0 or 1; in [0, 1].

    The fraction of samples that one model gets right and the other wrong; lower is closer. Golatkar
    et al.'s readout function as the paper's authors have it, who report the sum: N times as much.

    Raises:
        ValueError: the two are not for the same samples.
    """
    check_same_samples(method, reference)
    return float((method.correct != reference.correct).double().mean())


def class_confusion(outputs: Outputs) -> Tensor:
    """Mean predicted distribution of each true class.

    Returns:
        ``[C, C]`` float64; row y is the mean of the softmax over the samples with label y, and
        NaN where there are none.
    """
    sums = outputs.logits.new_zeros((outputs.num_classes,) * 2, dtype=torch.float64)
    sums.index_add_(0, outputs.targets, outputs.probabilities)
    counts = outputs.targets.bincount(minlength=outputs.num_classes)
    return sums / counts[:, None]


def confusion_shift(method: Outputs, reference: Outputs) -> Tensor:
    """:func:`class_confusion` of the method minus that of the reference.

    Returns:
        ``[C, C]`` float64, in [-1, 1]; rows sum to 0, and are NaN for classes without samples.
        Entry (y, k): how much more of class y's probability the method gives to class k.

    Raises:
        ValueError: the two are not for the same samples.
    """
    check_same_samples(method, reference)
    return class_confusion(method) - class_confusion(reference)


def confusion_distance(method: Outputs, reference: Outputs) -> Tensor:
    """Total variation of the class confusion, ``sum_k |shift(y, k)| / 2`` for each true class y.

    Returns:
        ``[C]`` float64, in [0, 1], NaN for classes without samples; lower is closer.

    Raises:
        ValueError: the two are not for the same samples.
    """
    return confusion_shift(method, reference).abs().sum(1) / 2


def _distributions(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, checked."""
    if p.ndim != 2 or p.numel() == 0 or p.shape != q.shape:
        raise ValueError(
            "p and q: expected probabilities [N, C] of the same, non-empty shape, "
            f"got {tuple(p.shape)} and {tuple(q.shape)}"
        )
    pair = p.double(), q.double()
    for name, values in zip("pq", pair, strict=True):
        # Written so that a NaN fails too.
        if not bool((values >= 0).all() & ((values.sum(1) - 1).abs() <= _SUM_TOLERANCE).all()):
            raise ValueError(
                f"{name}: expected probabilities, not negative and with rows that sum to 1 "
                "(Outputs.probabilities; logits are none)"
            )
    return pair
