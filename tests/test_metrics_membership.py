"""Membership attacks equal their definitions, written out slowly, and hold at p = 0 and p = 1."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fastfisher.metrics import (
    Outputs,
    ShadowAttack,
    ThresholdAttack,
    attack_quality,
    fit_thresholds,
    membership_statistic,
    rmia,
    u_lira,
)

BOOL = torch.bool


def answers(samples: int = 30, classes: int = 4, sureness: float = 0.0) -> Outputs:
    """Random logits, larger by ``sureness`` at the label."""
    targets = torch.randint(classes, (samples,))
    logits = 2 * torch.randn(samples, classes)
    logits[torch.arange(samples), targets] += sureness
    return Outputs(logits, targets)


# The curve


def test_quality_equals_counting_pairs_and_thresholds() -> None:
    scores = torch.randint(6, (40,)).double()  # with ties
    members = torch.arange(40) < 15
    inside, outside = scores[members].tolist(), scores[~members].tolist()
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    rates = [
        (sum(a >= t for a in inside) / 15, sum(b >= t for b in outside) / 25)
        for t in [*range(6), math.inf]
    ]
    found = attack_quality(scores, members, scores >= 3, [0.0, 0.1, 0.3, 1.0])
    assert found.auc == pytest.approx(statistics.fmean(pairs), rel=1e-12)
    assert found.best_balanced_accuracy == pytest.approx(max((1 + t - f) / 2 for t, f in rates))
    assert found.balanced_accuracy == pytest.approx((1 + rates[3][0] - rates[3][1]) / 2)
    assert found.tpr == {
        rate: pytest.approx(max(t for t, f in rates if f <= rate)) for rate in (0.0, 0.1, 0.3, 1.0)
    }


def test_quality_of_equal_perfect_and_infinite_scores() -> None:
    members = torch.tensor([True, True, False])
    tied = attack_quality(torch.zeros(3), members)
    assert (tied.auc, tied.best_balanced_accuracy, tied.balanced_accuracy) == (0.5, 0.5, None)
    assert tied.tpr == {0.001: 0.0, 0.01: 0.0}
    perfect = attack_quality(torch.tensor([math.inf, 0.0, -math.inf]), members)
    assert perfect.auc == 1 and perfect.tpr == {0.001: 1.0, 0.01: 1.0}


def test_quality_refuses() -> None:
    scores, members = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(TypeError, match="members"):
        attack_quality(scores, members.long())
    with pytest.raises(ValueError, match="decisions"):
        attack_quality(scores, members, torch.tensor([True]))
    with pytest.raises(ValueError, match="scores"):
        attack_quality(scores * math.nan, members)
    for one_kind in (members | True, members & False):
        with pytest.raises(ValueError, match="members"):
            attack_quality(scores, one_kind)
    with pytest.raises(ValueError, match="false_positive_rates"):
        attack_quality(scores, members, None, [1.5])


# Statistics and thresholds


def by_definition(p: list[float], y: int, kind: str) -> float:
    if kind == "correctness":
        return float(max(p) == p[y])
    if kind == "confidence":
        return p[y]
    if kind == "loss":
        return math.log(p[y])
    if kind == "entropy":
        return sum(x * math.log(x) for x in p)
    rest = sum(x * math.log(1 - x) for k, x in enumerate(p) if k != y)
    return (1 - p[y]) * math.log(p[y]) + rest


KINDS = ["correctness", "confidence", "loss", "entropy", "modified_entropy"]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_equal_their_formulas(kind: str) -> None:
    found = answers()
    expected = [
        by_definition(p, y, kind)
        for p, y in zip(found.probabilities.tolist(), found.targets.tolist(), strict=True)
    ]
    assert membership_statistic(found, kind).tolist() == pytest.approx(expected, rel=1e-11)  # type: ignore[arg-type]


def test_modified_entropy_where_probabilities_round() -> None:
    """A sure right answer is 0, a sure wrong one the sum of both its terms."""
    logits = torch.tensor([[60.0, 0.0], [0.0, 60.0], [0.0, -math.inf], [-math.inf, 0.0]])
    found = membership_statistic(
        Outputs(logits, torch.zeros(4, dtype=torch.int64)), "modified_entropy"
    )
    assert found.tolist() == pytest.approx([-2 * math.exp(-60) ** 2, -120, 0, -math.inf], abs=1e-40)


def test_statistics_refuse_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind"):
        membership_statistic(answers(), "margin")  # type: ignore[arg-type]


def slow_threshold(inside: list[float], outside: list[float]) -> float:
    def gain(threshold: float) -> Fraction:
        true = Fraction(sum(value >= threshold for value in inside), len(inside))
        return true - Fraction(sum(value >= threshold for value in outside), len(outside))

    candidates = sorted({math.inf, *inside, *outside}, reverse=True)
    return max(candidates, key=gain)  # of equal ones the first, the highest


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_equal_trying_each(kind: str) -> None:
    members, others = answers(50, sureness=2.0), answers(20)
    members.targets[members.targets == 3] = 0  # class 3 has no members
    fitted = fit_thresholds(members, others, kind)  # type: ignore[arg-type]
    inside, outside = (membership_statistic(each, kind) for each in (members, others))  # type: ignore[arg-type]
    expected = [
        slow_threshold(inside[members.targets == y].tolist(), outside[others.targets == y].tolist())
        for y in range(3)
    ] + [slow_threshold(inside.tolist(), outside.tolist())]
    assert fitted.thresholds.tolist() == expected
    one = fit_thresholds(members, others, kind, per_class=False)  # type: ignore[arg-type]
    assert one.thresholds.tolist() == [expected[3]] * 4


def test_a_threshold_attack_decides_and_is_judged_by_class() -> None:
    attack = ThresholdAttack("confidence", torch.tensor([0.9, 0.6]).double())
    logits = torch.tensor([0.95, 0.7, 0.7, 0.5]).logit()
    found = Outputs(
        torch.stack([logits, torch.zeros(4)], 1).where(
            torch.tensor([[True], [True], [False], [False]]),
            torch.stack([torch.zeros(4), logits], 1),
        ),
        torch.tensor([0, 0, 1, 1]),
    )
    assert attack.predict(found).tolist() == [True, False, True, False]
    quality = attack.quality(
        Outputs(found.logits[:1], found.targets[:1]), Outputs(found.logits[1:], found.targets[1:])
    )
    assert quality.auc == 1 and quality.balanced_accuracy == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="outputs: expected 2 classes"):
        attack.predict(answers(classes=3))
    with pytest.raises(ValueError, match="nonmembers"):
        fit_thresholds(answers(), answers(classes=3), "loss")


def test_one_sample_of_each_kind_is_enough() -> None:
    one = Outputs(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    attack = fit_thresholds(one, one, "loss")
    assert attack.thresholds.tolist() == [math.inf] * 2  # nothing tells them apart
    assert not attack.predict(one).any()


# Shadow models' posteriors


@pytest.mark.parametrize("definition", ["original", "authors"])
def test_the_shadow_attack_finds_overfitting_and_nothing_else(definition: str) -> None:
    def pair(sureness: float) -> tuple[Outputs, Outputs]:
        return answers(400, 3, sureness), answers(300, 3)

    def auc(members: Tensor, others: Tensor) -> float:
        inside = torch.arange(len(members) + len(others)) < len(members)
        return attack_quality(torch.cat([members, others]), inside).auc

    attack = ShadowAttack([pair(5.0), pair(5.0)], definition=definition)  # type: ignore[arg-type]
    again = ShadowAttack([pair(5.0)], definition=definition, seed=1)  # type: ignore[arg-type]
    members, others = pair(5.0)
    scores = attack.scores(members)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    # A posterior without its label tells about as much as its entropy.
    entropy = [membership_statistic(each, "entropy") for each in (members, others)]
    assert auc(scores, attack.scores(others)) > auc(*entropy) - 0.02 > 0.7
    assert auc(attack.scores(others), attack.scores(answers(300, 3))) == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(scores, again.scores(members))


def test_the_shadow_attack_repeats_itself() -> None:
    shadows = [(answers(60, 3, 3.0), answers(60, 3))]
    probe = answers(20, 3)
    one, two = (ShadowAttack(shadows, seed=4).scores(probe) for _ in range(2))
    assert torch.equal(one, two)


def test_the_authors_leave_out_members_that_are_wrong() -> None:
    wrong = Outputs(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"shadows: .*predicted correctly"):
        ShadowAttack([(wrong, wrong)], definition="authors")
    with pytest.raises(ValueError, match=r"shadows: .*of class 1"):
        ShadowAttack([(wrong, wrong)])


def test_the_shadow_attack_refuses() -> None:
    with pytest.raises(ValueError, match="shadows: expected at least"):
        ShadowAttack([])
    with pytest.raises(ValueError, match="definition"):
        ShadowAttack([(answers(), answers())], definition="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shadows: expected 4 classes"):
        ShadowAttack([(answers(), answers(classes=3))])
    with pytest.raises(ValueError, match="outputs"):
        ShadowAttack([(answers(90), answers(90))]).scores(answers(classes=3))


# Likelihood ratios


def confidences(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.98 + 0.01


def slow_rmia(
    x: Tensor,
    refs: Tensor,
    z: Tensor,
    refs_z: Tensor,
    trained: Tensor | None,
    gamma: float,
    a: float,
) -> list[float]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def prior_x(i: int) -> float:
        if trained is None:
            return (1 + a) / 2 * mean(refs[:, i].tolist()) + (1 - a) / 2
        return mean([mean(refs[trained[:, i] == kind, i].tolist()) for kind in (True, False)])

    def prior_z(j: int) -> float:
        out = mean(refs_z[:, j].tolist())
        return out if trained is not None else (1 + a) / 2 * out + (1 - a) / 2

    return [
        mean([float((x[i] / prior_x(i)) / (z[j] / prior_z(j)) >= gamma) for j in range(len(z))])
        for i in range(len(x))
    ]


def two_kinds(models: int, samples: int) -> Tensor:
    """For each sample two models of each kind at least."""
    kinds = torch.rand(models, samples) < 0.5
    kinds[:2], kinds[2:4] = True, False
    return kinds


@pytest.mark.parametrize(
    ("models", "online", "gamma", "a"),
    [(1, False, 2.0, 0.3), (2, False, 1.0, 0.0), (2, False, 1.3, 1.0), (5, True, 1.5, 0.3)],
)
def test_rmia_equals_its_definition_pair_by_pair(
    models: int, online: bool, gamma: float, a: float
) -> None:
    x, refs = confidences(12), confidences(models, 12)
    z, refs_z = confidences(20), confidences(models, 20)
    trained = two_kinds(models, 12) if online else None
    expected = slow_rmia(x, refs, z, refs_z, trained, gamma, a)
    assert 0.05 < statistics.fmean(expected) < 0.95
    found = rmia(x.log(), refs.log(), z.log(), refs_z.log(), trained_on=trained, gamma=gamma, a=a)
    assert found.tolist() == pytest.approx(expected, abs=1e-15)


def test_rmia_counts_ties_and_the_impossible() -> None:
    """Ratios of exactly gamma count; a confidence of 0 dominates nothing, not even another 0."""
    zero = torch.zeros(3)
    references, population = torch.zeros(1, 3), torch.zeros(1, 2)
    impossible = torch.tensor([-math.inf, 0.0])
    assert rmia(zero, references, zero[:2], population, gamma=1.0).tolist() == [1.0] * 3
    assert rmia(zero, references, zero[:2], population, gamma=1.01).tolist() == [0.0] * 3
    found = rmia(torch.tensor([0.0, -math.inf, 0.0]), references, impossible, population)
    assert found.tolist() == [0.5, 0.0, 0.5]


def test_rmia_refuses() -> None:
    x, refs = confidences(3).log(), confidences(2, 3).log()
    with pytest.raises(ValueError, match="target: expected logarithms"):
        rmia(x.exp(), refs, x, refs)
    with pytest.raises(ValueError, match="target: expected logarithms"):
        rmia(x * math.nan, refs, x, refs)
    with pytest.raises(ValueError, match=r"population_references: expected .models, samples"):
        rmia(x, refs, x, refs[:1])
    with pytest.raises(ValueError, match="references: p of a sample is 0"):
        rmia(x, refs - math.inf, x, refs, a=1.0)
    for name, value in (("gamma", 0.5), ("a", 1.1)):
        with pytest.raises(ValueError, match=name):
            rmia(x, refs, x, refs, **{name: value})
    with pytest.raises(TypeError, match="trained_on"):
        rmia(x, refs, x, refs, trained_on=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"trained_on: .*sample 0"):
        rmia(x, refs, x, refs, trained_on=torch.ones(2, 3, dtype=BOOL))


@pytest.mark.parametrize("variance", ["sample", "pooled"])
def test_u_lira_equals_the_ratio_of_two_normal_densities(variance: str) -> None:
    shadows, unlearned = 3 * torch.randn(9, 6).double() + 2, two_kinds(9, 6)
    attacked = torch.randn(4, 6).double()
    found = u_lira(attacked, shadows, unlearned, variance=variance)  # type: ignore[arg-type]

    def values(i: int, kind: bool) -> list[float]:
        return shadows[unlearned[:, i] == kind, i].tolist()

    def deviation(i: int, kind: bool) -> float:
        if variance == "sample":
            return statistics.stdev(values(i, kind))
        groups = [values(j, kind) for j in range(6)]
        squares = sum((v - statistics.fmean(g)) ** 2 for g in groups for v in g)
        return math.sqrt(squares / sum(len(g) - 1 for g in groups))

    for k, i in itertools.product(range(4), range(6)):
        learned, held_out = (
            statistics.NormalDist(statistics.fmean(values(i, kind)), deviation(i, kind))
            for kind in (True, False)
        )
        value = float(attacked[k, i])
        expected = math.log(learned.pdf(value)) - math.log(held_out.pdf(value))
        assert float(found[k, i]) == pytest.approx(expected, rel=1e-9)
    one = u_lira(attacked[1], shadows, unlearned, variance=variance)  # type: ignore[arg-type]
    assert torch.equal(one, found[1])


def test_u_lira_reaches_the_best_attack_on_normal_margins() -> None:
    """Margins one deviation apart: no attack has more than the AUC Phi(1 / sqrt 2) = 0.760."""
    models, samples = 80, 400
    unlearned = torch.rand(models, samples) < 0.5
    difficulty = 4 * torch.randn(samples)
    margins = difficulty + unlearned + torch.randn(models, samples)
    scores = u_lira(margins[:20], margins[20:], unlearned[20:])
    found = attack_quality(scores, unlearned[:20], scores > 0)
    assert found.auc == pytest.approx(statistics.NormalDist().cdf(1 / math.sqrt(2)), abs=0.02)
    assert attack_quality(margins[:20], unlearned[:20]).auc < 0.6  # one threshold for all samples


def test_u_lira_far_away_does_not_overflow() -> None:
    shadows = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    unlearned = torch.tensor([[True], [True], [False], [False]])
    found = float(u_lira(torch.tensor([-1e4]), shadows, unlearned))
    assert found == pytest.approx((10005.5**2 - 10000.5**2) / (2 * 0.5), rel=1e-9)


def test_u_lira_refuses() -> None:
    shadows, unlearned = torch.randn(6, 3), two_kinds(6, 3)
    attacked = torch.randn(3)
    with pytest.raises(TypeError, match="unlearned"):
        u_lira(attacked, shadows, unlearned.long())
    with pytest.raises(ValueError, match="unlearned: expected"):
        u_lira(attacked, shadows, unlearned[:, :2])
    lonely = unlearned.clone()
    lonely[:, 1], lonely[0, 1] = False, True
    with pytest.raises(ValueError, match=r"unlearned: .*sample 1"):
        u_lira(attacked, shadows, lonely)
    with pytest.raises(ValueError, match=r"attacked: expected .3."):
        u_lira(attacked[:2], shadows, unlearned)
    with pytest.raises(ValueError, match="attacked: expected finite"):
        u_lira(attacked - math.inf, shadows, unlearned)
    with pytest.raises(ValueError, match=r"shadows: expected .models"):
        u_lira(attacked, shadows[0], unlearned)
    with pytest.raises(ValueError, match=r"shadows: .*do not vary"):
        u_lira(attacked, torch.ones(6, 3), unlearned)
    with pytest.raises(ValueError, match="variance"):
        u_lira(attacked, shadows, unlearned, variance="none")  # type: ignore[arg-type]
