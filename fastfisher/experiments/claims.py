"""What the paper claims in section 4 and with Figure 1, and whether a reproduction found it too.

Each claim is quoted or closely paraphrased, and judged by a rule that its verdict states. Claims
are about the paper's methods: controls and methods beyond the paper take no part. Where a recipe
runs FisherMask in several definitions, a claim is judged once for each, beside the other methods in
the same definition as far as they have it.

Rules shared by all: accuracies are test accuracies; "complete" forgetting is at most 1%, "almost"
at most 5%; "near" is within 1 percentage point. Where the claim is that one number is larger than
another, the means over the seeds decide, and a lead no larger than the spread counts as "partly".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .aggregate import (
    Row,
    Setting,
    Stage,
    Stat,
    Summary,
    curve,
    paper_volatility,
    seconds,
    stat,
    value,
)
from .evidence import (
    Agrees,
    NotMeasured,
    View,
    above,
    all_of,
    balance,
    below,
    entries,
    leads,
    listed,
    plain,
    show,
    yes_if,
)

COMPLETE, ALMOST, NEAR = 0.01, 0.05, 0.01

FINETUNE, RANDOM, TFIDF, NOISE = "finetune", "random-mask", "tf-idf", "fisher-noise"
ACTIVATION, GRAD, FISHER = "activation-mask", "grad-mask", "fisher-mask"
BASELINES = (FINETUNE, RANDOM, TFIDF)
MASKS = (ACTIVATION, GRAD, FISHER)
PAPER = (FINETUNE, RANDOM, TFIDF, NOISE, *MASKS)
INFLUENCE = ("influence", "newton")


@dataclass(frozen=True)
class Verdict:
    """What was measured about a claim.

    Attributes:
        measured: the numbers and the rule, in words.
        agrees: whether the rule holds here.
    """

    measured: str
    agrees: Agrees


@dataclass(frozen=True)
class Claim:
    """One claim of the paper.

    Attributes:
        section: of the paper.
        text: what it says there.
        check: judges a summary.
    """

    section: str
    text: str
    check: Callable[[Summary], Verdict]


CLAIMS: list[Claim] = []


def _claim(section: str, text: str) -> Callable[[Callable[[View], Verdict]], object]:
    """Add a claim with its rule; the rule sees one definition at a time."""

    def add(rule: Callable[[View], Verdict]) -> object:
        CLAIMS.append(Claim(section, text, lambda summary: _judge(summary, rule)))
        return rule

    return add


def _judge(summary: Summary, rule: Callable[[View], Verdict]) -> Verdict:
    found: dict[Verdict, list[str]] = {}
    for definition in _definitions(summary):
        try:
            verdict = rule(View(summary, definition))
        except NotMeasured as missing:
            verdict = Verdict(f"Not measured: {missing}.", "not measured")
        found.setdefault(verdict, []).append(definition or "as given")
    if len(found) > 1:
        found = {v: names for v, names in found.items() if v.agrees != "not measured"}
    if len(found) == 1:
        return next(iter(found))
    text = " ".join(
        f"[{' and '.join(names)}: {verdict.agrees}] {verdict.measured}"
        for verdict, names in found.items()
    )
    return Verdict(text, all_of([verdict.agrees for verdict in found]))


def _definitions(summary: Summary) -> list[str | None]:
    """Definitions in which FisherMask ran; ``[None]`` where it has none."""
    found = [e.get("definition") for e in entries(summary, (FISHER,))]
    return list(dict.fromkeys(found)) or [None]


def _balances(view: View, found: Sequence[str], stage: Stage = "final") -> dict[str, Stat]:
    return {
        label: balance(view.get(label, "test_remain", stage), view.get(label, "test_forget", stage))
        for label in found
    }


def _reached(values: Sequence[float], goal: float) -> int | None:
    """The first epoch with at least ``goal``."""
    return next((epoch for epoch, found in enumerate(values) if found >= goal), None)


# Introduction, Figure 1


@_claim(
    "Figure 1",
    "After fine tuning on remain samples, it [the model] still has about 40% "
    "accuracy on the removed class.",
)
def _figure1_finetune(view: View) -> Verdict:
    found = view.get(view.label(FINETUNE), "test_forget")
    return Verdict(
        f"Finetune ends at {show(found)} on the removed class. Yes: 30% to 50%; partly: any other "
        "value above 1%.",
        yes_if(0.3 <= found.mean <= 0.5, found.mean > COMPLETE),
    )


@_claim(
    "Figure 1",
    "The one-step Newton update [influence function] almost remove no information (80% accuracy).",
)
def _figure1_influence(view: View) -> Verdict:
    label = view.label(_influence(view))
    found, before = view.get(label, "test_forget"), view.get(label, "test_forget", "original")
    return Verdict(
        f"{label} takes forget accuracy from {show(before)} to {show(found)}. Yes: it keeps at "
        "least 90% of it; partly: at least half.",
        yes_if(found.mean >= 0.9 * before.mean, found.mean >= 0.5 * before.mean),
    )


@_claim(
    "Figure 1",
    "Both direct fine tuning and influence function can not effectively unlearn data points.",
)
def _figure1_both(view: View) -> Verdict:
    found = [
        (label, view.get(label, "test_forget"))
        for label in (view.label(FINETUNE), view.label(_influence(view)))
    ]
    return Verdict(
        f"Forget accuracy at the end: {listed(found)}. Holds for each that ends above 1%.",
        all_of(yes_if(s.mean > COMPLETE) for _, s in found),
    )


def _influence(view: View) -> str:
    return next((name for name in INFLUENCE if view.present((name,))), INFLUENCE[0])


# Section 4.1, first


@_claim("4.1", "First, the retrained model takes a long time to learn.")
def _retraining_is_slow(view: View) -> Verdict:
    retrained = _seconds(view.retrained_rows())
    found = {label: _seconds(view.rows(label)) for label in view.present(PAPER)}
    slowest = max(found, key=lambda label: found[label], default=None)
    if slowest is None:
        raise NotMeasured("no method of the paper ran")
    faster = [label for label in found if found[label] < retrained]
    return Verdict(
        f"Retraining takes {retrained:.3g} s; {len(faster)} of {len(found)} methods take less, the "
        f"slowest ({slowest}) {found[slowest]:.3g} s. Yes: all take less; partly: some.",
        yes_if(len(faster) == len(found), bool(faster)),
    )


def _seconds(found: Sequence[Row]) -> float:
    return sum(map(seconds, found)) / len(found)


@_claim(
    "4.1",
    "Comparing with the retrained models, all unlearning strategies could accelerate "
    "the learning process.",
)
def _accelerate(view: View) -> Verdict:
    goal = view.retrained("test_remain").mean - NEAR
    histories = [curve(row, "test_remain") for row in view.retrained_rows()]
    retrained = _epochs([[v for v in h if v is not None] for h in histories], goal)
    if retrained is None:
        raise NotMeasured("no curve of the retrained models")
    found = {label: _epochs(view.curves(label, "test_remain"), goal) for label in view.tuned(PAPER)}
    faster = [label for label, epochs in found.items() if epochs is not None and epochs < retrained]
    if not found:
        raise NotMeasured("no method fine-tuned")
    told = ", ".join(
        f"{label} {'never' if epochs is None else f'{epochs:.3g}'}"
        for label, epochs in found.items()
    )
    return Verdict(
        f"Epochs until the remain accuracy is within 1 point of where retraining ends: retraining "
        f"{retrained:.3g}, {told}. Of the methods that fine-tune, yes: all need fewer; partly: "
        "some.",
        yes_if(len(faster) == len(found), bool(faster)),
    )


def _epochs(curves: Sequence[Sequence[float]], goal: float) -> float | None:
    """Mean epochs to the goal; ``None`` where a seed does not get there."""
    found = [_reached(c, goal) for c in curves]
    reached = [epochs for epochs in found if epochs is not None]
    return sum(reached) / len(reached) if found and len(reached) == len(found) else None


@_claim(
    "4.1",
    "[All unlearning strategies could] achieve a comparable performance to the final "
    "performance of retrained model.",
)
def _comparable(view: View) -> Verdict:
    retrained = view.retrained("test_remain")
    found = [(label, view.get(label, "test_remain")) for label in view.tuned(PAPER)]
    if not found:
        raise NotMeasured("no method fine-tuned")
    near = [s.mean >= retrained.mean - 2 * NEAR for _, s in found]
    return Verdict(
        f"Remain accuracy at the end: retrained {show(retrained)}, {listed(found)}. Comparable: at "
        "most 2 points below; of the methods that fine-tune, yes: all; partly: some.",
        yes_if(all(near), any(near)),
    )


# Section 4.1, second


@_claim(
    "4.1",
    "Unlearning only with fine tuning could be not enough: the Finetune method could "
    "not unlearn completely on most settings.",
)
def _finetune_incomplete(view: View) -> Verdict:
    label = view.label(FINETUNE)
    ends = [v for row in view.rows(label) if (v := value(row, "test_forget")) is not None]
    above = sum(v > COMPLETE for v in ends)
    found = view.get(label, "test_forget")
    return Verdict(
        f"{label} ends at {show(found)} forget accuracy, above 1% for {above} of {len(ends)} "
        "seeds of this one setting. Yes: for most seeds; partly: for some.",
        yes_if(2 * above > len(ends), above > 0),
    )


@_claim(
    "4.1",
    "On the dataset CIFAR10/100 and Tiny-ImageNet, Finetune method still remains high "
    "accuracy on forget set.",
)
def _finetune_high(view: View) -> Verdict:
    if plain(view.data()) not in ("cifar10", "cifar100", "tinyimagenet"):
        raise NotMeasured(f"the data here is {view.data()}")
    label = view.label(FINETUNE)
    found = view.get(label, "test_forget")
    return Verdict(
        f"{label} ends at {show(found)} forget accuracy on {view.data()}. High: at least 10%; "
        "partly: above 1%.",
        yes_if(found.mean >= 0.1, found.mean > COMPLETE),
    )


@_claim(
    "4.1",
    "FisherNoise method unlearns too much even including the critical information for "
    "remain data: it has a poor remain accuracy on all datasets.",
)
def _noise_poor(view: View) -> Verdict:
    label = view.label(NOISE)
    before = view.get(label, "test_remain", "original")
    found = view.get(label, "test_remain", "start")
    return Verdict(
        f"{label} takes remain accuracy from {show(before)} to {show(found)} on {view.data()}. "
        "Yes: it keeps less than half; partly: less than 90%.",
        yes_if(found.mean < 0.5 * before.mean, found.mean < 0.9 * before.mean),
    )


@_claim(
    "4.1", "[FisherNoise has a poor remain accuracy] especially on CIFAR100 and MNIST datasets."
)
def _noise_datasets(view: View) -> Verdict:
    raise NotMeasured(f"a comparison of data sets; this recipe has {view.data()} only")


@_claim(
    "4.1",
    "Even masking random parameters (RandomMask) helps unlearning: it has better forget "
    "results compared to Finetune method.",
)
def _random_helps(view: View) -> Verdict:
    random, finetune = view.label(RANDOM), view.label(FINETUNE)
    ends = [(label, view.get(label, "test_forget")) for label in (random, finetune)]
    # After the start of fine-tuning, which is a different model for the two.
    during = [
        (label, stat(sum(c[1:]) / len(c[1:]) for c in view.curves(label, "test_forget")))
        for label in (random, finetune)
    ]
    means = [(label, found) for label, found in during if found is not None]
    return Verdict(
        f"Forget accuracy at the end: {listed(ends)}; mean over the fine-tuning epochs: "
        f"{listed(means)}. Yes: RandomMask is lower in both by more than the spread.",
        all_of([below(ends[0][1], ends[1][1]), below(means[0][1], means[1][1])]),
    )


@_claim(
    "4.1",
    "It may because that randomly mask parameters helps optimizing on the new loss of "
    "the fine tuning process, and makes it easier to find a better local optimum.",
)
def _random_why(view: View) -> Verdict:
    raise NotMeasured("an explanation, for which the paper gives no test")


# Section 4.1, third


@_claim(
    "4.1",
    "Third, FisherMask method performs best when unlearning with only masking without fine tuning.",
)
def _fisher_best_masked(view: View) -> Verdict:
    label = view.label(FISHER)
    found = _balances(view, view.present(PAPER), "start")
    return Verdict(
        f"Remain minus forget accuracy before fine-tuning, in points: {listed(found.items(), '')}. "
        f"Yes: {label} has the largest by more than the spread.",
        leads(label, found),
    )


@_claim(
    "4.1", "[FisherMask] maintains 87% of its original performance while almost forgot completely."
)
def _fisher_87(view: View) -> Verdict:
    label = view.label(FISHER)
    before = view.get(label, "test_remain", "original")
    remain = view.get(label, "test_remain", "start")
    forget = view.get(label, "test_forget", "start")
    kept = remain.mean / before.mean if before.mean else 0.0
    holds = [kept >= 0.87, forget.mean <= ALMOST]
    return Verdict(
        f"{label} without fine-tuning keeps {100 * kept:.1f}% of the original remain accuracy "
        f"({show(remain)} of {show(before)}) at {show(forget)} forget accuracy. Yes: at least "
        "87% kept and at most 5% forget accuracy; partly: one of the two.",
        yes_if(all(holds), any(holds)),
    )


@_claim("4.1", "FisherNoise can almost perfectly remove information.")
def _noise_removes(view: View) -> Verdict:
    label = view.label(NOISE)
    found = view.get(label, "test_forget", "start")
    return Verdict(
        f"{label}: forget accuracy {show(found)} after the noise. Yes: at most 1%; partly: at "
        "most 5%.",
        yes_if(found.mean <= COMPLETE, found.mean <= ALMOST),
    )


@_claim(
    "4.1",
    "[FisherNoise] also removes too much useful information and has the lowest remain "
    "accuracy among all methods.",
)
def _noise_lowest(view: View) -> Verdict:
    label = view.label(NOISE)
    found = {name: view.get(name, "test_remain", "start") for name in view.present(PAPER)}
    return Verdict(
        f"Remain accuracy before fine-tuning: {listed(found.items())}. Yes: {label} has the lowest "
        "by more than the spread.",
        leads(label, found, lowest=True),
    )


# Section 4.1, finally


@_claim(
    "4.1",
    "Finally, it is not sufficient to only see performances on remain sets: there may "
    "be many local optima that are good in the performance of remain set but cannot unlearn "
    "completely.",
)
def _remain_is_not_enough(view: View) -> Verdict:
    retrained = view.retrained("test_remain")
    tuned = view.tuned(PAPER)
    if not tuned:
        raise NotMeasured("no method fine-tuned")
    found = [
        (label, forget)
        for label in tuned
        if view.get(label, "test_remain").mean >= retrained.mean - NEAR
        and (forget := view.get(label, "test_forget")).mean > COMPLETE
    ]
    told = f"these: {listed(found)} forget accuracy" if found else "none"
    return Verdict(
        f"Methods that end within 1 point of the retrained remain accuracy ({show(retrained)}) or "
        f"above it, with more than 1% forget accuracy: {told}. Yes: there is one.",
        yes_if(bool(found)),
    )


@_claim(
    "4.1",
    "Considering both performances on remain and forget set, ActivationMask, GradMask "
    "and FisherMask obtain appreciable increase in performances.",
)
def _masks_increase(view: View) -> Verdict:
    found = _balances(view, [view.label(name) for name in (FINETUNE, *MASKS)])
    finetune, *masks = found.values()
    return Verdict(
        f"Remain minus forget accuracy at the end, in points: {listed(found.items(), '')}. Holds "
        "for each mask that is at least 1 point above Finetune.",
        all_of(yes_if(mask.mean >= finetune.mean + NEAR) for mask in masks),
    )


@_claim("4.1", "FisherMask method unlearns completely on all experiment settings.")
def _fisher_complete(view: View) -> Verdict:
    label = view.label(FISHER)
    ends = [v for row in view.rows(label) if (v := value(row, "test_forget")) is not None]
    found = view.get(label, "test_forget")
    complete = sum(v <= COMPLETE for v in ends)
    return Verdict(
        f"{label} ends at {show(found)} forget accuracy, at most 1% for {complete} of {len(ends)} "
        "seeds of this one setting. Yes: all seeds; partly: some.",
        yes_if(complete == len(ends), complete > 0),
    )


@_claim("4.1", "[FisherMask] also exhibits the best stability among other methods.")
def _fisher_stable(view: View) -> Verdict:
    label = view.label(FISHER)
    told, parts = [], []
    for metric, name in (("test_forget", "forget"), ("test_remain", "remain")):
        found = {other: view.volatility(other, metric) for other in view.tuned(PAPER)}
        told.append(f"{name}: {listed(found.items(), '')}")
        parts.append(leads(label, found, lowest=True) if label in found else "no")
    return Verdict(
        f"Mean absolute change per epoch, in points: {'; '.join(told)}. Yes: {label} has the "
        "lowest in both by more than the spread; partly: in one.",
        all_of(parts),
    )


@_claim(
    "4.1",
    "ActivationMask performs comparably [to FisherMask] in most settings except "
    "DenseNet on Tiny-ImageNet.",
)
def _activation_comparable(view: View) -> Verdict:
    activation, fisher = view.label(ACTIVATION), view.label(FISHER)
    told, parts = [], []
    for metric, name in (("test_forget", "forget"), ("test_remain", "remain")):
        pair = [(label, view.get(label, metric)) for label in (activation, fisher)]
        told.append(f"{name}: {listed(pair)}")
        parts.append(yes_if(abs(pair[0][1].mean - pair[1][1].mean) <= NEAR))
    return Verdict(
        f"At the end, {'; '.join(told)}. Comparable: within 1 point; partly: in one of the two. "
        "One setting.",
        all_of(parts),
    )


@_claim(
    "4.1",
    "Considering a faster running time, ActivationMask can be good choice of unlearning "
    "method in most settings.",
)
def _activation_fast(view: View) -> Verdict:
    found = []
    for label in (view.label(ACTIVATION), view.label(FISHER)):
        taken = stat(row["seconds"].get("edit") for row in view.rows(label))
        if taken is None:
            raise NotMeasured(f"no run time of {label}")
        found.append((label, taken.mean))
    (activation, fast), (fisher, slow) = found
    return Verdict(
        f"Scoring and masking take {fast:.3g} s with {activation}, {slow:.3g} s with {fisher}. "
        "Yes: ActivationMask takes less.",
        yes_if(fast < slow),
    )


@_claim("4.1", "GradMask performances relatively poor.")
def _grad_poor(view: View) -> Verdict:
    names = [view.label(name) for name in (GRAD, ACTIVATION, FISHER)]
    found = _balances(view, names)
    grad, *others = found.values()
    return Verdict(
        f"Remain minus forget accuracy at the end, in points: {listed(found.items(), '')}. Holds "
        "against each of the other two that is above it by more than the spread.",
        all_of(below(grad, other) for other in others),
    )


@_claim(
    "4.1",
    "[GradMask is poor] probably because we only mask parameters in convolution layer "
    "and information in the BatchNorm layer can not be touched.",
)
def _grad_why(view: View) -> Verdict:
    raise NotMeasured("an explanation; the authors' code does zero BatchNorm for GradMask")


# Section 4.1, volatility


@_claim(
    "4.1",
    "The forget accuracy of TF-IDF method on Tiny-ImageNet with DenseNet: forgetting "
    "performances becomes 0 after removing, but they grows rapidly after few fine tuning "
    "epochs.",
)
def _tfidf_regrows(view: View) -> Verdict:
    recipe = plain(str(view.summary["recipe"].get("name", "")))
    if plain(view.data()) != "tinyimagenet" or "densenet" not in recipe:
        raise NotMeasured("the recipe is not DenseNet on Tiny-ImageNet")
    label = view.label(TFIDF)
    curves = view.curves(label, "test_forget")
    start = sum(c[0] for c in curves) / len(curves)
    peak = sum(max(c[1:6]) for c in curves) / len(curves)
    return Verdict(
        f"{label}: {100 * start:.1f}% after masking, up to {100 * peak:.1f}% within five epochs. "
        "Yes: at most 1% at first, then at least 10%; partly: a rise of at least 5 points.",
        yes_if(start <= COMPLETE and peak >= 0.1, peak - start >= 0.05),
    )


@_claim(
    "4.1", "All masking method have smaller volatility score on forget set than baseline methods."
)
def _masks_volatility(view: View) -> Verdict:
    masks = {name: view.volatility(name, "test_forget") for name in view.tuned(MASKS)}
    others = {name: view.volatility(name, "test_forget") for name in view.tuned(BASELINES)}
    if not masks or not others:
        raise NotMeasured("no mask or no baseline to compare")
    return Verdict(
        f"Mean absolute change of the forget accuracy per epoch, in points: "
        f"{listed(masks.items(), '')}; baselines: {listed(others.items(), '')}. Yes: each mask is "
        f"below each baseline by more than the spread. By the paper's formula: "
        f"{_formulas(view, [*masks, *others], 'test_forget')}.",
        all_of(below(mask, other) for mask in masks.values() for other in others.values()),
    )


@_claim(
    "4.1",
    "FisherMask has the smallest [volatility score on forget set] which means its "
    "performance does not change rapidly.",
)
def _fisher_forget_volatility(view: View) -> Verdict:
    return _lowest_volatility(view, "test_forget", PAPER)


@_claim("4.1", "On the remain set, only the Finetune and RandomMask have a low volatility score.")
def _two_low(view: View) -> Verdict:
    low = {n: view.volatility(n, "test_remain") for n in view.tuned((FINETUNE, RANDOM))}
    others = {n: view.volatility(n, "test_remain") for n in view.tuned((TFIDF, *MASKS))}
    if len(low) < 2 or not others:
        raise NotMeasured("no curves of Finetune, RandomMask and another method")
    return Verdict(
        f"Mean absolute change of the remain accuracy per epoch, in points: "
        f"{listed(low.items(), '')}; the others: {listed(others.items(), '')}. Yes: the two are "
        f"below each other method by more than the spread. By the paper's formula: "
        f"{_formulas(view, [*low, *others], 'test_remain')}.",
        all_of(below(a, b) for a in low.values() for b in others.values()),
    )


@_claim(
    "4.1",
    "Except the two, FisherMask still have a smallest score [on the remain set] which "
    "also demonstrates a good stability in the fine tuning process.",
)
def _fisher_remain_volatility(view: View) -> Verdict:
    return _lowest_volatility(view, "test_remain", (TFIDF, *MASKS))


def _lowest_volatility(view: View, metric: str, names: Sequence[str]) -> Verdict:
    label = view.label(FISHER)
    found = {name: view.volatility(name, metric) for name in view.tuned(names)}
    if label not in found:
        raise NotMeasured(f"{label} did not fine-tune")
    part = metric.removeprefix("test_")
    return Verdict(
        f"Mean absolute change of the {part} accuracy per epoch, in points: "
        f"{listed(found.items(), '')}. Yes: {label} has the smallest by more than the spread. By "
        f"the paper's formula: {_formulas(view, list(found), metric)}.",
        leads(label, found, lowest=True),
    )


def _formulas(view: View, names: Sequence[str], metric: str) -> str:
    """The paper's own score, which takes no part in the rule: it sees the end points only."""
    forget = metric == "test_forget"
    told = []
    for name in names:
        found = stat(paper_volatility(c, forget=forget) for c in view.curves(name, metric))
        told.append(f"{name} {'-' if found is None else f'{100 * found.mean:+.2f}'}")
    return ", ".join(told)


# Section 4.2

_OUTLIERS = "outliers"
_CRITERIA = (("test_remain", "test"), ("test_forget", "noise"))


def _outliers(view: View, setting: Setting, metric: str) -> dict[str, Stat]:
    """By method of the paper's Table 2 that ran."""
    names = view.present((FINETUNE, RANDOM, *MASKS), _OUTLIERS)
    return {n: view.get(n, metric, "final", _OUTLIERS, setting) for n in names}


@_claim(
    "4.2",
    "All three methods performs better than baseline methods in most settings [removing outliers].",
)
def _outlier_masks(view: View) -> Verdict:
    masks = view.present(MASKS, _OUTLIERS)
    baselines = view.present((FINETUNE, RANDOM), _OUTLIERS)
    if not masks or not baselines:
        raise NotMeasured('no mask or no baseline in "outliers"')
    wins = dict.fromkeys(masks, 0)
    places = [(s, metric) for s in view.at(_OUTLIERS, "share") for metric, _ in _CRITERIA]
    for setting, metric in places:
        found = _outliers(view, setting, metric)
        for mask in masks:
            wins[mask] += all(found[mask].mean > found[other].mean for other in baselines)
    told = ", ".join(f"{mask} in {won} of {len(places)}" for mask, won in wins.items())
    most = [2 * won > len(places) for won in wins.values()]
    return Verdict(
        f"Above every baseline ({', '.join(baselines)}), over the shares of outliers and both "
        f"criteria, at the end of fine-tuning (the paper takes the best epoch): {told}. Holds for "
        "each that is above in more than half.",
        all_of(map(yes_if, most)),
    )


@_claim("4.2", "FisherMask method performs best both on test set and corrected noisy data.")
def _outlier_fisher(view: View) -> Verdict:
    label = view.label(FISHER, _OUTLIERS)
    told, parts = [], []
    for setting in view.at(_OUTLIERS, "share"):
        for metric, name in _CRITERIA:
            found = _outliers(view, setting, metric)
            ranked = sorted(found.items(), key=lambda item: -item[1].mean)
            best = next((item for item in ranked if item[0] != label), None)
            pair = [(label, found[label]), *([best] if best else [])]
            told.append(f"{setting['share']:.0%} {name}: {listed(pair)}")
            parts.append(leads(label, found))
    return Verdict(
        f"Beside the best other method, {'; '.join(told)}. Yes: {label} is first everywhere by "
        "more than the spread.",
        all_of(parts),
    )


@_claim(
    "4.2",
    "With the increase of noise ratio, FisherMask performs better than other methods "
    "more obviously.",
)
def _outlier_trend(view: View) -> Verdict:
    label = view.label(FISHER, _OUTLIERS)
    shares = view.at(_OUTLIERS, "share")
    if len(shares) < 2:
        raise NotMeasured("a single share of outliers")
    leads = []
    for setting in shares:
        margins = []
        for metric, _ in _CRITERIA:
            found = _outliers(view, setting, metric)
            others = [s.mean for name, s in found.items() if name != label]
            if not others:
                raise NotMeasured('no other method in "outliers"')
            margins.append(found[label].mean - max(others))
        leads.append(sum(margins) / len(margins))
    told = ", ".join(
        f"{s['share']:.0%} {100 * lead:+.2f}" for s, lead in zip(shares, leads, strict=True)
    )
    return Verdict(
        f"Lead of {label} over the best other method, mean of both criteria, in points: {told}. "
        "Yes: it grows with each share; partly: it is larger at the largest share than at the "
        "smallest.",
        yes_if(_rising(leads), leads[-1] > leads[0]),
    )


def _rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


# Section 4.3

_LIMITED = "limited"


def _samples(view: View, none: bool) -> Setting:
    """The setting without remain data, or the one with the fewest."""
    found = [s for s in view.at(_LIMITED, "remain_samples") if (s["remain_samples"] == 0) is none]
    if not found:
        raise NotMeasured(f'"limited" has no run {"without" if none else "with few"} remain data')
    return found[0]


@_claim(
    "4.3",
    "When no remain training data provided, both ActivationMask and FisherMask method "
    "can unlearn efficiently.",
)
def _none_unlearns(view: View) -> Verdict:
    setting = _samples(view, True)
    labels = [view.label(name, _LIMITED) for name in (ACTIVATION, FISHER)]
    found = [(n, view.get(n, "test_forget", "start", _LIMITED, setting)) for n in labels]
    return Verdict(
        f"Forget accuracy without remain data: {listed(found)}. Holds for each of at most 5%.",
        all_of(yes_if(s.mean <= ALMOST) for _, s in found),
    )


@_claim(
    "4.3",
    "[Without remain data] ActivationMask has a lower remain accuracy compared to FisherMask.",
)
def _none_remain(view: View) -> Verdict:
    setting = _samples(view, True)
    labels = [view.label(name, _LIMITED) for name in (ACTIVATION, FISHER)]
    found = [(n, view.get(n, "test_remain", "start", _LIMITED, setting)) for n in labels]
    return Verdict(
        f"Remain accuracy without remain data: {listed(found)}. Yes: that of ActivationMask is "
        "lower by more than the spread.",
        below(found[0][1], found[1][1]),
    )


@_claim(
    "4.3",
    "With only 0.1% of the remain training data: (i) Finetune still remains a high "
    "forget accuracy which shows the difficulty to complete unlearning.",
)
def _few_finetune(view: View) -> Verdict:
    setting = _samples(view, False)
    label = view.label(FINETUNE, _LIMITED)
    found = view.get(label, "test_forget", "final", _LIMITED, setting)
    return Verdict(
        f"{label} with {setting['remain_samples']} remain samples ends at {show(found)} forget "
        "accuracy. High: at least 10%; partly: above 1%.",
        yes_if(found.mean >= 0.1, found.mean > COMPLETE),
    )


@_claim(
    "4.3",
    "(ii) ActivationMask has an unstable forget accuracy during the fine tuning "
    "process: its forgetting curve gradually increase.",
)
def _few_activation(view: View) -> Verdict:
    setting = _samples(view, False)
    label = view.label(ACTIVATION, _LIMITED)
    curves = view.curves(label, "test_forget", _LIMITED, setting)
    first, last = (stat(c[i] for c in curves) for i in (0, -1))
    assert first is not None and last is not None
    rise = last.mean - first.mean
    return Verdict(
        f"{label} with {setting['remain_samples']} remain samples goes from {show(first)} to "
        f"{show(last)} forget accuracy. Yes: it rises by at least 5 points; partly: by at "
        "least 1.",
        yes_if(rise >= 0.05, rise >= 0.01),
    )


@_claim(
    "4.3",
    "While in Figure 2, the forget accuracy [of ActivationMask] are always 0 with full "
    "remain training set provided.",
)
def _full_activation(view: View) -> Verdict:
    label = view.label(ACTIVATION)
    highest = max(max(c) for c in view.curves(label, "test_forget"))
    return Verdict(
        f"{label} with all remain data: at most {100 * highest:.1f}% forget accuracy at any epoch "
        "of any seed. Yes: at most 1%; partly: at most 5%.",
        yes_if(highest <= COMPLETE, highest <= ALMOST),
    )


@_claim(
    "4.3",
    "Regarding remain accuracy, it [ActivationMask] also fails to recover the fully performances.",
)
def _few_activation_remain(view: View) -> Verdict:
    label, before, found, told = _recovery(view, ACTIVATION)
    return Verdict(
        f"{told} Yes: {label} ends more than 1 point below the original.",
        yes_if(found.mean < before.mean - NEAR),
    )


@_claim("4.3", "(iii) FisherMask can keep a stable forget performance.")
def _few_fisher_forget(view: View) -> Verdict:
    setting = _samples(view, False)
    label = view.label(FISHER, _LIMITED)
    curves = view.curves(label, "test_forget", _LIMITED, setting)
    swing = max(max(c) - min(c) for c in curves)
    return Verdict(
        f"{label} with {setting['remain_samples']} remain samples: forget accuracy varies by at "
        f"most {100 * swing:.1f} points over the epochs of any seed. Yes: at most 1; partly: at "
        "most 5.",
        yes_if(swing <= NEAR, swing <= ALMOST),
    )


@_claim(
    "4.3",
    "[FisherMask fully recovers] the remain accuracy: boosted from 53% (45.16 / 85.02) "
    "to almost identical (86.26 / 85.02) with only 0.1% of the remain data.",
)
def _few_fisher_remain(view: View) -> Verdict:
    label, before, found, told = _recovery(view, FISHER)
    setting = _samples(view, True)
    bare = view.get(label, "test_remain", "start", _LIMITED, setting)
    return Verdict(
        f"{told} Without remain data it has {show(bare)}. Yes: {label} ends at most 1 point below "
        "the original; partly: it ends at least 5 points above its accuracy without remain data.",
        yes_if(found.mean >= before.mean - NEAR, found.mean >= bare.mean + 0.05),
    )


def _recovery(view: View, name: str) -> tuple[str, Stat, Stat, str]:
    setting = _samples(view, False)
    label = view.label(name, _LIMITED)
    before = view.get(label, "test_remain", "original", _LIMITED, setting)
    found = view.get(label, "test_remain", "final", _LIMITED, setting)
    return (
        label,
        before,
        found,
        (
            f"{label} with {setting['remain_samples']} remain samples ends at {show(found)} "
            f"remain accuracy; the original has {show(before)}."
        ),
    )


@_claim(
    "4.3",
    "Importance scores derived from Fisher information helps to improve data efficiency "
    "of unlearning.",
)
def _few_best(view: View) -> Verdict:
    setting = _samples(view, False)
    label = view.label(FISHER, _LIMITED)
    found = {
        n: balance(
            view.get(n, "test_remain", "final", _LIMITED, setting),
            view.get(n, "test_forget", "final", _LIMITED, setting),
        )
        for n in view.present((FINETUNE, ACTIVATION, FISHER), _LIMITED)
    }
    return Verdict(
        f"Remain minus forget accuracy at the end with {setting['remain_samples']} remain samples, "
        f"in points: {listed(found.items(), '')}. Yes: {label} has the largest by more than the "
        "spread.",
        leads(label, found),
    )


# Section 4.4

_RATIOS = "ratios"


def _ratios(view: View) -> tuple[str, list[Setting]]:
    found = view.at(_RATIOS, "ratio")
    if len(found) < 2:
        raise NotMeasured("a single ratio")
    return view.label(FISHER, _RATIOS), found


@_claim("4.4", "Accuracy on forget dataset remains 0 as remove ratio ranges from 0 to 0.12.")
def _ratio_forget(view: View) -> Verdict:
    label, found = _ratios(view)
    ends = [
        (f"R = {s['ratio']:g}", view.get(label, "test_forget", "final", _RATIOS, s)) for s in found
    ]
    complete = [s.mean <= COMPLETE for _, s in ends]
    return Verdict(
        f"Forget accuracy of {label} at the end: {listed(ends)}. Yes: at most 1% for every ratio; "
        "partly: for some.",
        yes_if(all(complete), any(complete)),
    )


@_claim(
    "4.4",
    "Performances [on remain data] degrade significantly as the percentage of masking increases.",
)
def _ratio_remain(view: View) -> Verdict:
    label, found = _ratios(view)
    means = []
    for s in found:
        curves = view.curves(label, "test_remain", _RATIOS, s)
        means.append(stat(sum(c) / len(c) for c in curves))
    there = [(f"R = {s['ratio']:g}", m) for s, m in zip(found, means, strict=True) if m is not None]
    drop = there[0][1].mean - there[-1][1].mean
    falling = _rising([-m.mean for _, m in there])
    return Verdict(
        f"Remain accuracy of {label}, mean from masking to the last epoch: {listed(there)}. Yes: "
        "it falls with each ratio, by at least 5 points in all; partly: by at least 1 point from "
        "the smallest to the largest ratio.",
        yes_if(falling and drop >= 0.05, drop >= 0.01),
    )


@_claim(
    "4.4",
    "Oscillation of curves also becomes progressively larger as the increase of remove ratio.",
)
def _ratio_oscillation(view: View) -> Verdict:
    label, found = _ratios(view)
    told = [
        (f"R = {s['ratio']:g}", view.volatility(label, "test_remain", _RATIOS, s)) for s in found
    ]
    means = [s.mean for _, s in told]
    return Verdict(
        f"Mean absolute change of the remain accuracy of {label} per epoch, in points: "
        f"{listed(told, '')}. Yes: it grows with each ratio; partly: it is larger at the largest "
        "ratio than at the smallest.",
        yes_if(_rising(means), means[-1] > means[0]),
    )


@_claim(
    "4.4",
    "When the remove ratio is relatively small, the performance change curve is "
    "relatively flat: a small drop of performances, which quickly pick up.",
)
def _ratio_flat(view: View) -> Verdict:
    label, found = _ratios(view)
    small = next((s for s in found if s["ratio"] > 0), None)
    if small is None:
        raise NotMeasured("no ratio above 0")
    curves = view.curves(label, "test_remain", _RATIOS, small)
    drop = sum(c[0] - min(c) for c in curves) / len(curves)
    lost = sum(c[0] - c[-1] for c in curves) / len(curves)
    holds = [drop <= 0.1, lost <= NEAR]
    return Verdict(
        f"{label} at R = {small['ratio']:g}: remain accuracy falls by {100 * drop:.1f} points at "
        f"most after masking, and ends {-100 * lost:+.1f} points from there. Yes: a drop of at "
        "most 10 points that is made up for (to within 1 point); partly: one of the two.",
        yes_if(all(holds), any(holds)),
    )


@_claim(
    "4.4",
    "The performance drops a lot when the remove ratio is higher: when we scrub too "
    "many information, it is hard for fine tuning to find them back even with the full remain "
    "training set.",
)
def _ratio_lost(view: View) -> Verdict:
    label, found = _ratios(view)
    large = found[-1]
    before = view.get(label, "test_remain", "original", _RATIOS, large)
    masked = view.get(label, "test_remain", "start", _RATIOS, large)
    after = view.get(label, "test_remain", "final", _RATIOS, large)
    holds = [before.mean - masked.mean >= 0.2, before.mean - after.mean > 2 * NEAR]
    return Verdict(
        f"{label} at R = {large['ratio']:g}: remain accuracy {show(before)} before, "
        f"{show(masked)} after masking, {show(after)} at the end. Yes: at least 20 points lost "
        "by masking and more than 2 points still missing at the end; partly: one of the two.",
        yes_if(all(holds), any(holds)),
    )


# Section 4.5

_SCHEDULES = "schedules"


def _rates(view: View) -> list[Setting]:
    """The constant schedules, the largest rate first."""
    rates = {}
    for setting in view.at(_SCHEDULES, "schedule"):
        if found := re.fullmatch(r"constant ([0-9.e+-]+)", str(setting["schedule"])):
            rates[float(found[1])] = setting
    if len(rates) < 2:
        raise NotMeasured("fewer than two constant learning rates")
    return [rates[rate] for rate in sorted(rates, reverse=True)]


def _replay(view: View) -> Setting:
    for setting in view.at(_SCHEDULES, "schedule"):
        if setting["schedule"] == "replay":
            return setting
    raise NotMeasured("no run with the replayed schedule")


def _by_rate(view: View, label: str, metric: str, found: Sequence[Setting]) -> dict[str, Stat]:
    return {str(s["schedule"]): view.get(label, metric, "final", _SCHEDULES, s) for s in found}


def _swings(view: View, label: str, metric: str, found: Sequence[Setting]) -> dict[str, Stat]:
    return {str(s["schedule"]): view.volatility(label, metric, _SCHEDULES, s) for s in found}


@_claim("4.5", "(i) For Finetune, a large learning rate is helpful for forgetting.")
def _large_forgets(view: View) -> Verdict:
    label = view.label(FINETUNE, _SCHEDULES)
    found = _by_rate(view, label, "test_forget", _rates(view))
    large, *_, small = found.values()
    return Verdict(
        f"{label}, forget accuracy at the end: {listed(found.items())}. Yes: lower at the largest "
        "rate than at the smallest by more than the spread.",
        below(large, small),
    )


@_claim("4.5", "[A large learning rate] may lead to a worse and less stable remain performance.")
def _large_unstable(view: View) -> Verdict:
    label = view.label(FINETUNE, _SCHEDULES)
    remain = _by_rate(view, label, "test_remain", _rates(view))
    swings = _swings(view, label, "test_remain", _rates(view))
    (worse, *_, better), (wild, *_, calm) = remain.values(), swings.values()
    return Verdict(
        f"{label}, remain accuracy at the end: {listed(remain.items())}; mean absolute change per "
        f"epoch, in points: {listed(swings.items(), '')}. Yes: at the largest rate, lower and less "
        "stable than at the smallest by more than the spread; partly: one of the two.",
        all_of([below(worse, better), above(wild, calm)]),
    )


@_claim(
    "4.5",
    "A smaller learning rate helps keeping high remain accuracy but is harmful to the "
    "forgetting performance.",
)
def _small_keeps(view: View) -> Verdict:
    label = view.label(FINETUNE, _SCHEDULES)
    large, *_, small = _rates(view)
    before = view.get(label, "test_remain", "original", _SCHEDULES, small)
    kept = view.get(label, "test_remain", "final", _SCHEDULES, small)
    forget = [
        (str(s["schedule"]), view.get(label, "test_forget", "final", _SCHEDULES, s))
        for s in (small, large)
    ]
    return Verdict(
        f"{label} at {small['schedule']}: remain accuracy {show(before)} before and {show(kept)} "
        f"at the end; forget accuracy at the end: {listed(forget)}. Yes: at the smallest rate at "
        "most 1 point of remain accuracy lost, and a higher forget accuracy than at the largest; "
        "partly: one of the two.",
        all_of([yes_if(kept.mean >= before.mean - NEAR), above(forget[0][1], forget[1][1])]),
    )


@_claim(
    "4.5",
    "Our scheduler could find a balance between stable high remain accuracy and low "
    "forget accuracy [for Finetune].",
)
def _replay_finetune(view: View) -> Verdict:
    return _replay_balance(view, FINETUNE)


@_claim(
    "4.5",
    "(ii) For ActivationMask, our scheduler could recover the performance of the remain "
    "data as quickly as possible (as small learning rate) while maintaining stability and "
    "accelerating unlearning (as large learning rate).",
)
def _replay_activation(view: View) -> Verdict:
    return _replay_balance(view, ACTIVATION)


def _replay_balance(view: View, name: str) -> Verdict:
    label = view.label(name, _SCHEDULES)
    replay, rates = _replay(view), _rates(view)
    remain = _by_rate(view, label, "test_remain", [replay, *rates])
    forget = _by_rate(view, label, "test_forget", [replay, *rates])
    best = max(s.mean for key, s in remain.items() if key != "replay")
    lowest = min(s.mean for key, s in forget.items() if key != "replay")
    return Verdict(
        f"{label} at the end, remain accuracy: {listed(remain.items())}; forget accuracy: "
        f"{listed(forget.items())}. Yes: the replay is within 1 point of the best constant rate in "
        "both; partly: in one.",
        all_of(
            [
                yes_if(remain["replay"].mean >= best - NEAR),
                yes_if(forget["replay"].mean <= lowest + NEAR),
            ]
        ),
    )


@_claim("4.5", "(iii) FisherMask is less influenced by the learning rate.")
def _fisher_rates(view: View) -> Verdict:
    label = view.label(FISHER, _SCHEDULES)
    others = view.present((FINETUNE, ACTIVATION), _SCHEDULES)
    if not others:
        raise NotMeasured('no other method in "schedules"')
    told, parts = [], []
    for metric, name in (("test_forget", "forget"), ("test_remain", "remain")):
        spans = {}
        for other in (label, *others):
            found = _by_rate(view, other, metric, [_replay(view), *_rates(view)])
            means = [s.mean for s in found.values()]
            spans[other] = max(means) - min(means)
        told.append(f"{name}: " + ", ".join(f"{n} {100 * s:.1f}" for n, s in spans.items()))
        parts.append(all_of(yes_if(spans[label] < spans[other]) for other in others))
    return Verdict(
        f"Range over the schedules of the accuracy at the end, in points: {'; '.join(told)}. Yes: "
        f"{label} has the smallest range in both.",
        all_of(parts),
    )
