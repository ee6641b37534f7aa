"""Membership attacks that treat all samples alike: thresholds, and shadow models' posteriors.

They overestimate privacy (Hayes et al. 2025); :mod:`.likelihood` has attacks on single samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .attack_quality import AttackQuality, attack_quality
from .outputs import Outputs

Statistic = Literal["confidence", "entropy", "modified_entropy", "correctness", "loss"]
ShadowDefinition = Literal["original", "authors"]


def membership_statistic(outputs: Outputs, kind: Statistic) -> Tensor:
    """One number a sample, higher for what looks like a training sample.

    Song and Mittal 2021, with p the softmax and y the label:

    * "correctness": 1 if the largest logit is that of y, else 0.
    * "confidence": ``p_y``, in [0, 1].
    * "loss": ``log p_y``, at most 0 (Yeom et al. 2018); the order of the confidence, but without
      ties where that rounds to 1.
    * "entropy": ``sum_k p_k log p_k``, minus the entropy, in [-log C, 0].
    * "modified_entropy": ``(1 - p_y) log p_y + sum_(k != y) p_k log(1 - p_k)``, at most 0; minus
      theirs, so 0 is a sure and right answer and a sure and wrong one goes to minus infinity.

    Returns:
        ``[N]`` float64.

    Raises:
        ValueError: an unknown ``kind``.
    """
    if kind == "correctness":
        return outputs.correct.double()
    if kind == "confidence":
        return outputs.losses.neg().exp()
    if kind == "loss":
        return -outputs.losses
    p = outputs.probabilities
    if kind == "entropy":
        return torch.xlogy(p, p).sum(1)
    if kind == "modified_entropy":
        labels = outputs.targets[:, None]
        of_others = (p * _log_complements(outputs, p)).scatter(1, labels, 0.0).sum(1)
        return outputs.margins.neg().sigmoid() * -outputs.losses + of_others
    raise ValueError(f"kind: expected one of {get_args(Statistic)}, got {kind!r}")


def _log_complements(outputs: Outputs, p: Tensor) -> Tensor:
    """``log(1 - p)``, ``[N, C]``; for the largest p from the others, as 1 - p would cancel."""
    largest = p.argmax(1, keepdim=True)
    log_p = outputs.logits.double().log_softmax(1)
    others = log_p.scatter(1, largest, -torch.inf).logsumexp(1, keepdim=True)
    return (-p).log1p().scatter(1, largest, others)


@dataclass(frozen=True, eq=False)
class ThresholdAttack:
    """Calls a sample a member if its statistic is at least the threshold of its class.

    Attributes:
        statistic: as of :func:`membership_statistic`.
        thresholds: ``[C]`` float64.
    """

    statistic: Statistic
    thresholds: Tensor

    def predict(self, outputs: Outputs) -> Tensor:
        """Whether each sample is called a member, ``[N]`` bool.

        Of the forget set, ``1 - mean`` is the MIA efficacy of Jia et al. 2023 (the fraction called
        non-members); it is to be compared with that of retrained models.

        Raises:
            ValueError: another number of classes than the attack was fitted on.
        """
        if outputs.num_classes != len(self.thresholds):
            raise ValueError(
                f"outputs: expected {len(self.thresholds)} classes, got {outputs.num_classes}"
            )
        return membership_statistic(outputs, self.statistic) >= self.thresholds[outputs.targets]

    def quality(self, members: Outputs, nonmembers: Outputs) -> AttackQuality:
        """Of the statistic and of the decisions on samples that the attack was not fitted on.

        Args:
            members: for unlearning, the forget set.
            nonmembers: test samples of the same kind; of the same class, if one is forgotten.

        Raises:
            ValueError: another number of classes than the attack was fitted on.
        """
        both = members, nonmembers
        decisions = torch.cat([self.predict(each) for each in both])
        scores = torch.cat([membership_statistic(each, self.statistic) for each in both])
        return attack_quality(scores, torch.arange(len(scores)) < len(members), decisions)


def fit_thresholds(
    members: Outputs,
    nonmembers: Outputs,
    statistic: Statistic,
    *,
    per_class: bool = True,
) -> ThresholdAttack:
    """Choose the thresholds with the largest ``(TPR + TNR) / 2`` (Song and Mittal 2021).

    The rates, and not the numbers right, so that many members do not outvote few non-members; of
    equally good thresholds the highest.

    Args:
        members: of a model whose training samples are known: the shadow model of Song and Mittal,
            or the unlearned model itself with its remain set.
        nonmembers: samples that this model has not seen.
        statistic: as of :func:`membership_statistic`.
        per_class: a threshold for each class, as theirs. A class that has no members or no
            non-members, as a class that was forgotten, takes that of all samples together.

    Raises:
        ValueError: an unknown ``statistic``, or different numbers of classes.
    """
    classes = members.num_classes
    if nonmembers.num_classes != classes:
        raise ValueError(f"nonmembers: expected {classes} classes, got {nonmembers.num_classes}")
    inside = membership_statistic(members, statistic)
    outside = membership_statistic(nonmembers, statistic)
    thresholds = _best_threshold(inside, outside).repeat(classes)
    for label in range(classes) if per_class else ():
        of_members, of_others = members.targets == label, nonmembers.targets == label
        if bool(of_members.any()) and bool(of_others.any()):
            thresholds[label] = _best_threshold(inside[of_members], outside[of_others])
    return ThresholdAttack(statistic, thresholds)


def _best_threshold(inside: Tensor, outside: Tensor) -> Tensor:
    """The highest of the best thresholds, a value there is; infinite if none beats "no member"."""
    values = torch.cat([inside, outside]).unique()
    missed, refused = (torch.searchsorted(each.sort()[0], values) for each in (inside, outside))
    # TPR - FPR, times both numbers: integers, so that rounding breaks no tie.
    gain = refused * len(inside) - missed * len(outside)
    if not bool((gain > 0).any()):
        return values.new_tensor(torch.inf)
    return values[gain == gain.max()][-1]


class ShadowAttack:
    """Attack networks on the posteriors of shadow models (Shokri et al. 2017). Legacy.

    * "original": one network a class, with a hidden layer of 64, on every sample.
    * "authors" (the paper's code): one network for all classes, hidden layers of 256 and 128, 10
      epochs; of the members only those that the shadow model gets right. Here without their
      dropout.

    Members and non-members are made equally many, for each network, by leaving out at random.

    Args:
        shadows: for each shadow model its outputs for samples that it was trained on, and for
            samples that it was not.
        definition: which of the two.
        seed: of what is left out and of the networks.

    Raises:
        ValueError: an unknown ``definition``, no shadow models, different numbers of classes, or
            (for the class named in the message) no members or no non-members.
    """

    def __init__(
        self,
        shadows: Sequence[tuple[Outputs, Outputs]],
        *,
        definition: ShadowDefinition = "original",
        seed: int = 0,
    ) -> None:
        if definition not in get_args(ShadowDefinition):
            raise ValueError(
                f"definition: expected one of {get_args(ShadowDefinition)}, got {definition!r}"
            )
        if not shadows:
            raise ValueError("shadows: expected at least one shadow model")
        self._classes = shadows[0][0].num_classes
        if any(part.num_classes != self._classes for pair in shadows for part in pair):
            raise ValueError(f"shadows: expected {self._classes} classes in all of them")
        self._per_class = definition == "original"
        generator = torch.Generator().manual_seed(seed)
        sides = [_posteriors([pair[side] for pair in shadows]) for side in (0, 1)]
        if not self._per_class:
            members, labels, correct = sides[0]
            sides[0] = members[correct], labels[correct], correct[correct]
        self._networks: dict[int, Any] = {}
        for label in range(self._classes) if self._per_class else (0,):
            parts = [p[y == label] if self._per_class else p for p, y, _ in sides]
            fewest = min(map(len, parts))
            if fewest == 0:
                where = f"of class {label}" if self._per_class else "predicted correctly"
                raise ValueError(f"shadows: expected members and non-members {where}")
            balanced = [p[torch.randperm(len(p), generator=generator)[:fewest]] for p in parts]
            self._networks[label] = _attack_network(balanced, definition, seed)

    def scores(self, outputs: Outputs) -> Tensor:
        """Probability that each sample is a member, by the attack network; ``[N]`` float64.

        The attack's decision is "at least 0.5".

        Raises:
            ValueError: another number of classes than the shadow models have.
        """
        if outputs.num_classes != self._classes:
            raise ValueError(f"outputs: expected {self._classes} classes")
        posteriors = outputs.probabilities
        groups = outputs.targets if self._per_class else torch.zeros_like(outputs.targets)
        result = torch.empty(len(outputs), dtype=torch.float64)
        for label in groups.unique().tolist():
            chosen = groups == label
            predicted = self._networks[label].predict_proba(posteriors[chosen].numpy())[:, 1]
            result[chosen] = torch.from_numpy(predicted)
        return result


def _posteriors(parts: Sequence[Outputs]) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, labels, and what is predicted correctly, of all shadow models together."""
    return (
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([part.correct for part in parts]),
    )


def _attack_network(parts: Sequence[Tensor], definition: ShadowDefinition, seed: int) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    sizes, epochs = ((64,), 200) if definition == "original" else ((256, 128), 10)
    network = MLPClassifier(sizes, max_iter=epochs, random_state=seed)
    members, nonmembers = parts
    truth = torch.arange(len(members) + len(nonmembers)) < len(members)
    with warnings.catch_warnings():
        # A fixed number of epochs is the definition, not a failure to converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(torch.cat([members, nonmembers]).numpy(), truth.numpy())
    return network
