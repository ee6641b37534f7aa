"""The tables of a reproduction, each with its heading: what the page and the Markdown both show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..unlearning.report import NONE, Section, Table, cell, number
from .aggregate import (
    REMOVE_CLASS,
    Gap,
    Row,
    Setting,
    Stage,
    Stat,
    Summary,
    curve,
    gap,
    labels,
    masked_rows,
    mean_history,
    measure,
    over_rows,
    reference,
    reference_rows,
    rows,
    seconds,
    settings,
    stat,
    value,
    volatility,
)
from .claims import CLAIMS, Verdict

RETRAIN = "Retrain"
ORIGINAL = "Original"
NEAR = "≈"

Kind = Literal["share", "number"]


@dataclass(frozen=True)
class _Metric:
    """How a metric is headed and written: a share in percent, or a plain number."""

    head: str
    kind: Kind


# In the order of the columns; a metric that is not here comes after them under its own name.
_METRICS = {
    "test_forget": _Metric("forget, test", "share"),
    "test_remain": _Metric("remain, test", "share"),
    "train_forget": _Metric("forget, train", "share"),
    "train_remain": _Metric("remain, train", "share"),
    "average_gap": _Metric("average gap", "share"),
    "tug_of_war": _Metric("tug of war", "number"),
    "js_forget": _Metric("JS, forget", "number"),
    "js_remain": _Metric("JS, remain", "number"),
    "zrf": _Metric("ZRF", "number"),
    "activation_distance_forget": _Metric("activation distance, forget", "number"),
    "activation_distance_remain": _Metric("activation distance, remain", "number"),
    "prediction_distance": _Metric("prediction distance", "number"),
    "relearn_epochs": _Metric("relearn epochs", "number"),
    "mia_confidence": _Metric("MIA, confidence", "share"),
    "mia_entropy": _Metric("MIA, entropy", "share"),
}


def written(found: Stat | None, kind: Kind = "share", digits: int = 1) -> str:
    """A mean with its spread; it says so where some seeds lack the value."""
    if found is None:
        return NONE
    if kind == "number":
        factor, digits = 1, _decimals(found.mean)
    else:
        factor = 100
    text = f"{factor * found.mean:.{digits}f}"
    if found.spread is not None:
        text += f" ± {factor * found.spread:.{digits}f}"
    return text if found.count == found.rows else f"{text} ({found.count} of {found.rows})"


def _decimals(value: float) -> int:
    return 3 if abs(value) < 10 else 1


def _gap(found: Gap | None, kind: Kind = "share") -> str:
    if found is None:
        return NONE
    text = (
        f"{100 * found.difference:+.1f}"
        if kind == "share"
        else f"{found.difference:+.{_decimals(found.difference)}f}"
    )
    return f"{NEAR} {text}" if found.inside else text


def closest(summary: Summary) -> tuple[str, float] | None:
    """The method that ends closest to the retrained models, controls aside.

    Returns:
        Its label, and the mean of its distances in forget and in remain test accuracy; ``None``
        where no method and retrained model can be compared.
    """
    controls = {entry["label"] for entry in summary["methods"] if entry["control"]}
    found = {}
    for label in labels(summary, REMOVE_CLASS):
        gaps = [_final_gap(summary, label, metric) for metric in ("test_forget", "test_remain")]
        there = [abs(g.difference) for g in gaps if g is not None]
        if label not in controls and len(there) == 2:
            found[label] = sum(there) / 2
    best = min(found, key=lambda label: found[label], default=None)
    return None if best is None else (best, found[best])


def _final_gap(summary: Summary, label: str, metric: str) -> Gap | None:
    return gap(
        measure(summary, REMOVE_CLASS, label, metric), reference(summary, REMOVE_CLASS, metric)
    )


def verdicts(summary: Summary) -> list[Verdict]:
    """One verdict a claim."""
    return [claim.check(summary) for claim in CLAIMS]


def headline(summary: Summary) -> str:
    """What was removed, what came closest to retraining, and how the claims fared."""
    data = summary["data"]
    text = (
        f"Removed: {data['forget']:,} of {data['train']:,} training images; {data['remain']:,} "
        "remain."
    )
    best = closest(summary)
    if best is not None:
        label, distance = best
        pair = [
            f"{_percent(measure(summary, REMOVE_CLASS, label, metric))} "
            f"(retrained {_percent(reference(summary, REMOVE_CLASS, metric))})"
            for metric in ("test_forget", "test_remain")
        ]
        text += (
            f" Of all methods {label} ends closest to the retrained models: forget accuracy "
            f"{pair[0]} and remain accuracy {pair[1]} on test images, on average "
            f"{100 * distance:.1f} points away."
        )
    found = Counter(verdict.agrees for verdict in verdicts(summary))
    return text + (
        f" Of {len(CLAIMS)} claims of the paper, {found['yes']} agree with what was measured "
        f"here, {found['partly']} agree partly, {found['no']} do not, and "
        f"{found['not measured']} were not measured."
    )


def _percent(found: Stat | None) -> str:
    return f"{written(found)}%"


def tables(summary: Summary) -> dict[str, Section]:
    """Every table that the summary has numbers for, by name, in the order to read them."""
    found = {
        "tuned": _tuned(summary),
        "masked": _masked(summary),
        "outliers": _outliers(summary),
        "limited": _limited(summary),
        "ratios": _ratios(summary),
        "schedules": _schedules(summary),
        "metrics": _metrics(summary),
        "gaps": _gaps(summary),
        "audits": _audits(summary),
        "times": _times(summary),
        "claims": _claims(summary),
        "methods": _methods(summary),
    }
    return {name: section for name, section in found.items() if section is not None}


def _tuned(summary: Summary) -> Section | None:
    present = labels(summary, REMOVE_CLASS)
    if not present:
        return None
    metrics = ("test_forget", "test_remain", "train_forget", "train_remain")

    def line(name: str, group: Sequence[Row], stage: Stage, against: bool) -> list[str]:
        cells = [name]
        for metric in metrics:
            found = stat(value(row, metric, stage) for row in group)
            cells.append(written(found))
            if metric.startswith("test"):
                retrained = reference(summary, REMOVE_CLASS, metric) if against else None
                cells.append(_gap(gap(found, retrained)))
        return cells

    body = [line(ORIGINAL, _originals(summary, REMOVE_CLASS), "original", True)]
    if retrained := reference_rows(summary, REMOVE_CLASS):
        body.append(line(RETRAIN, retrained, "final", False))
    body += [line(name, rows(summary, REMOVE_CLASS, name), "final", True) for name in present]
    return Section(
        "After the whole method, beside the retrained models",
        "Accuracy in percent, mean ± spread over the seeds. Forget: what was to be removed. "
        f"Remain: everything else. Gap: points above the mean of the retrained models; {NEAR} "
        "marks a gap no larger than the spread of the retrained models. Closer to 0 is better, in "
        "both.",
        Table(
            ("method", "forget, test", "gap", "remain, test", "gap", "forget, train",
             "remain, train"),
            body,
        ),
    )  # fmt: skip


def _originals(summary: Summary, experiment: str, setting: Setting | None = None) -> list[Row]:
    """One row a seed: all methods of a seed start from the same model."""
    return list({row["seed"]: row for row in rows(summary, experiment, None, setting)}.values())


def _masked(summary: Summary) -> Section | None:
    found = masked_rows(summary)
    if not found:
        return None
    body = [
        [
            row.label,
            written(row.remain),
            written(row.remain_volatility, digits=2),
            written(row.remain_formula, digits=2),
            written(row.forget),
            written(row.forget_volatility, digits=2),
            written(row.forget_formula, digits=2),
        ]
        for row in found
    ]
    heads = ("method", "remain", "volatility", "paper's", "forget", "volatility", "paper's")
    return Section(
        "Before fine-tuning (as Table 1)",
        "Test accuracy in percent right after masking, or of the original model for a method that "
        "edits nothing before it trains. Volatility: mean absolute change from epoch to epoch of "
        "fine-tuning, in points. Paper's: the formula that the paper prints, a sum of signed "
        "changes that depends on the first and the last epoch alone.",
        Table(heads, body),
    )


def _outliers(summary: Summary) -> Section | None:
    found = _by(summary, "outliers", "share")
    if not found:
        return None

    def line(name: str, groups: Sequence[Sequence[Row]], stage: Stage) -> list[str]:
        return [
            name,
            *(
                written(stat(value(row, metric, stage) for row in group))
                for group in groups
                for metric in ("test_remain", "test_forget")
            ),
        ]

    body = [line(ORIGINAL, [_originals(summary, "outliers", s) for s in found], "original")]
    retrained = [reference_rows(summary, "outliers", setting) for setting in found]
    if any(retrained):
        body.append(line(RETRAIN, retrained, "final"))
    body += [
        line(name, [rows(summary, "outliers", name, s) for s in found], "final")
        for name in labels(summary, "outliers")
    ]
    heads = [f"{s['share']:.0%} {what}" for s in found for what in ("test", "noise")]
    return Section(
        "Removing outliers (as Table 2)",
        "A share of the training labels was shuffled, then those samples were removed. Accuracy in "
        "percent after the last epoch of fine-tuning. Test: the test set. Noise: the removed "
        "samples with their true labels.",
        Table(("method", *heads), body),
    )


def _by(summary: Summary, experiment: str, key: str) -> list[Setting]:
    """Settings of an experiment in the order of what it varies."""
    found = [setting for setting in settings(summary, experiment) if key in setting]
    return sorted(found, key=lambda setting: setting[key])


def _limited(summary: Summary) -> Section | None:
    groups = [
        (s["remain_samples"], name, rows(summary, "limited", name, s))
        for s in _by(summary, "limited", "remain_samples")
        for name in labels(summary, "limited")
    ]
    body = [
        [
            name,
            f"{samples:,}" if samples else "none",
            *_ends(group, ("start", "final") if samples else ("start",)),
        ]
        for samples, name, group in groups
        if group
    ]
    if not body:
        return None
    heads = ("method", "remain samples", *_END_HEADS)
    return Section(
        "With little remain data (as Figure 3)",
        "Both the scores and the fine-tuning see only so many samples of the remain set; with none "
        "there is no fine-tuning. Test accuracy in percent, before and after fine-tuning.",
        Table(heads, [[*line, *[NONE] * (len(heads) - len(line))] for line in body]),
    )


_END_HEADS = ("forget, before", "remain, before", "forget, after", "remain, after")


def _ends(group: Sequence[Row], stages: Sequence[Stage] = ("start", "final")) -> list[str]:
    return [
        written(stat(value(row, metric, stage) for row in group))
        for stage in stages
        for metric in ("test_forget", "test_remain")
    ]


def _ratios(summary: Summary) -> Section | None:
    found = _by(summary, "ratios", "ratio")
    if not found:
        return None
    body = []
    for name in labels(summary, "ratios"):
        for setting in found:
            group = rows(summary, "ratios", name, setting)
            if group:
                swing = over_rows(group, lambda row: volatility(curve(row, "test_remain")))
                line = [name, f"{setting['ratio']:g}", *_ends(group), written(swing, digits=2)]
                body.append(line)
    return Section(
        "Different ratios (as Figure 4)",
        "R is the share of all units that the mask zeroes. Test accuracy in percent, before and "
        "after fine-tuning; volatility: mean absolute change of the remain accuracy from epoch to "
        "epoch, in points.",
        Table(("method", "R", *_END_HEADS, "volatility"), body),
    )


def _schedules(summary: Summary) -> Section | None:
    found = settings(summary, "schedules")
    if not found:
        return None
    body = []
    for name in labels(summary, "schedules"):
        for setting in found:
            group = rows(summary, "schedules", name, setting)
            if group:
                ends = _ends(group, ("final",))
                swings = [
                    written(stat(volatility(curve(row, metric)) for row in group), digits=2)
                    for metric in ("test_forget", "test_remain")
                ]
                body.append([name, str(setting["schedule"]), *ends, *swings])
    return Section(
        "Learning-rate schedules (as Figure 5)",
        "Replay: the learning rates of the original training, compressed into the first epochs of "
        "fine-tuning. Test accuracy in percent after the last epoch; volatility: mean absolute "
        "change from epoch to epoch, in points.",
        Table(
            ("method", "schedule", "forget", "remain", "forget volatility", "remain volatility"),
            body,
        ),
    )


def _keys(summary: Summary) -> list[str]:
    """Metrics that some final model of "remove-class" has, the known ones first."""
    every = [*reference_rows(summary, REMOVE_CLASS), *rows(summary, REMOVE_CLASS)]
    there = {
        key: None
        for row in every
        for key, found in row["final"].items()
        if isinstance(found, (int, float))
    }
    return [key for key in _METRICS if key in there] + [k for k in there if k not in _METRICS]


def _metric(key: str) -> _Metric:
    return _METRICS.get(key, _Metric(key.replace("_", " "), "number"))


def _metrics(summary: Summary) -> Section | None:
    keys = _keys(summary)
    if not keys:
        return None
    groups = [(RETRAIN, reference_rows(summary, REMOVE_CLASS))]
    groups += [(name, rows(summary, REMOVE_CLASS, name)) for name in labels(summary, REMOVE_CLASS)]
    body = [
        [
            name,
            *(written(stat(value(row, key) for row in group), _metric(key).kind) for key in keys),
        ]
        for name, group in groups
        if group
    ]
    return Section(
        "All metrics",
        "Of the model at the end. Accuracies, the average gap and the rates of membership "
        "inference (MIA) are in percent; JS: Jensen-Shannon divergence to the retrained models.",
        Table(("method", *(_metric(key).head for key in keys)), body),
    )


def _gaps(summary: Summary) -> Section | None:
    retrained = {key: reference(summary, REMOVE_CLASS, key) for key in _keys(summary)}
    keys = [key for key, found in retrained.items() if found is not None]
    if not keys or not labels(summary, REMOVE_CLASS):
        return None
    body = [
        [name, *(_gap(_final_gap(summary, name, key), _metric(key).kind) for key in keys)]
        for name in labels(summary, REMOVE_CLASS)
    ]
    spread = [
        NONE
        if found is None or found.spread is None
        else written(Stat(found.spread, None, found.count, found.count), _metric(key).kind)
        for key, found in retrained.items()
        if key in keys
    ]
    return Section(
        "Gap of every metric to the retrained models",
        "Mean of the method minus mean of the retrained models, shares in points. The first line "
        f"is the spread of the retrained models among themselves; {NEAR} marks a gap no larger.",
        Table(
            ("method", *(_metric(key).head for key in keys)),
            [["spread of Retrain", *spread], *body],
        ),
    )


def _audits(summary: Summary) -> Section | None:
    audits = summary.get("audits") or {}
    found = audits.get("rows") or []
    if not found:
        return None
    names = list(dict.fromkeys(row["method"] for row in found))
    rates = sorted({rate for row in found for rate in row.get("ulira_tpr") or {}}, key=float)
    body = []
    for name in names:
        group = [row for row in found if row["method"] == name]
        areas = [stat(row.get(key) for row in group) for key in ("rmia_auc", "ulira_auc")]
        hits = [stat((row.get("ulira_tpr") or {}).get(rate) for row in group) for rate in rates]
        body.append([name, *(written(a, "number") for a in areas), *(written(hit) for hit in hits)])
    heads = [f"U-LiRA TPR at {100 * float(rate):g}% FPR" for rate in rates]
    return Section(
        "Membership inference with shadow models",
        f"Budget: {cell(audits.get('budget'))}. AUC: 0.5 is a coin toss. TPR: share of the removed "
        "samples found, in percent, at that share of false alarms (FPR).",
        Table(("method", "RMIA AUC", "U-LiRA AUC", *heads), body),
    )


def _times(summary: Summary) -> Section | None:
    groups = [(RETRAIN, reference_rows(summary, REMOVE_CLASS))]
    groups += [(name, rows(summary, REMOVE_CLASS, name)) for name in labels(summary, REMOVE_CLASS)]
    retrained = over_rows(groups[0][1], seconds)
    body = []
    for name, group in groups:
        if not group:
            continue
        total = over_rows(group, seconds)
        times = "-"
        if retrained is not None and total is not None and total.mean > 0:
            times = f"{number(retrained.mean / total.mean, 3)}×"
        body.append(
            [
                name,
                written(stat(row["seconds"].get("edit") for row in group), "number"),
                written(stat(row["seconds"].get("fit") for row in group), "number"),
                written(total, "number"),
                times,
            ]
        )
    if not body:
        return None
    return Section(
        "Run time",
        "Seconds, without the evaluations. Editing includes scoring; scores that an earlier run "
        "left are read, not computed again. The last column: how many times as fast as retraining.",
        Table(("method", "editing", "training", "in all", "faster"), body),
    )


_VERDICT_CLASSES = {"yes": "yes", "no": "no", "partly": "partly", "not measured": "unmeasured"}


def _claims(summary: Summary) -> Section:
    found = verdicts(summary)
    body = [
        [claim.section, verdict.agrees, claim.text, verdict.measured]
        for claim, verdict in zip(CLAIMS, found, strict=True)
    ]
    marks = {(i, 1): _VERDICT_CLASSES[verdict.agrees] for i, verdict in enumerate(found)}
    return Section(
        "What the paper claims, and what was measured here",
        "Every claim of section 4 and of Figure 1, quoted or shortened, with the rule that judges "
        "it. The rules look at this recipe alone, and at the methods of the paper only. Where a "
        "claim ranks methods, the means decide, and a lead within the spread over the seeds counts "
        "as partly.",
        Table(("section", "agrees", "claim", "measured here"), body, marks, frozenset({2, 3})),
    )


def _methods(summary: Summary) -> Section | None:
    body = [
        [
            entry["label"],
            entry["method"],
            entry.get("definition") or NONE,
            "control" if entry["control"] else "beyond" if entry["beyond_paper"] else "paper",
            cell(entry.get("options") or {}),
        ]
        for entry in summary["methods"]
    ]
    return Section(
        "Methods and definitions",
        "Paper: of the paper. Beyond: added here. Control: a trivial edit, which shows what a "
        "metric cannot see. Definition: whose reading of the method, where there are several.",
        Table(("label", "method", "definition", "part", "options"), body, {}, frozenset({4})),
    )


def accuracy_curves(summary: Summary) -> Section | None:
    """Test accuracy per epoch as a table, for a page without charts; at most eight epochs."""
    groups = {
        name: [mean_history(rows(summary, REMOVE_CLASS, name), f"test_{part}")
               for part in ("forget", "remain")]
        for name in labels(summary, REMOVE_CLASS)
    }  # fmt: skip
    last = max((e for pair in groups.values() for line in pair for _, e, _ in line), default=0)
    if not last:
        return None
    step = -(-last // 8)
    points = [("original", 0), ("masked", 0), *(("epoch", e) for e in range(step, last + 1, step))]
    if points[-1] != ("epoch", last):
        points.append(("epoch", last))
    body = []
    for name, pair in groups.items():
        forget, remain = ({(s, e): found for s, e, found in line} for line in pair)
        cells = [
            f"{_mean(forget.get(point))} / {_mean(remain.get(point))}"
            if point in forget or point in remain
            else NONE
            for point in points
        ]
        body.append([name, *cells])
    heads = [stage if stage != "epoch" else str(epoch) for stage, epoch in points]
    return Section(
        "Accuracy per epoch (as Figure 2)",
        "Test accuracy in percent, forget / remain, mean over the seeds: of the original, after "
        "masking, and after so many epochs of fine-tuning.",
        Table(("method", *heads), body),
    )


def _mean(found: Stat | None) -> str:
    return NONE if found is None else f"{100 * found.mean:.1f}"
