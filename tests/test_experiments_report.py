"""What a reproduction measured is aggregated, judged and shown as it is."""

from __future__ import annotations

import copy
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from fastfisher.experiments.aggregate import (
    Stat,
    gap,
    masked_rows,
    measure,
    paper_volatility,
    reference,
    stat,
    volatility,
)
from fastfisher.experiments.claims import CLAIMS
from fastfisher.experiments.markdown import results_page
from fastfisher.experiments.report import reproduction_page
from fastfisher.experiments.tables import closest, headline, tables
from fastfisher.unlearning.charts import Line, heat_map, line_chart
from tests.test_report import Checker

Pair = tuple[float, float]
METHODS = {
    "Finetune": "finetune",
    "RandomMask": "random-mask",
    "TF-IDF": "tf-idf",
    "FisherNoise": "fisher-noise",
    "ActivationMask": "activation-mask",
    "GradMask": "grad-mask",
    "FisherMask": "fisher-mask",
    "Influence": "influence",
    "SSD": "ssd",
    "Head row": "head-row",
}
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ORIGINAL = (0.88, 0.85)

# Accuracies (forget, remain): after masking, at the end, and how far the epochs swing around the
# straight line between the two. In "paper" its claims hold, in "opposite" their opposites do.
WORLDS: dict[str, dict[str, Any]] = {
    "paper": {
        "retrain": (0.85, 400.0),
        "activation seconds": 0.5,
        "remove-class": {
            "Finetune": (None, (0.35, 0.85)),
            "RandomMask": ((0.80, 0.845), (0.20, 0.85)),
            "TF-IDF": ((0.40, 0.42), (0.05, 0.85)),
            "FisherNoise": ((0.00, 0.30), None),
            "ActivationMask": ((0.008, 0.63), (0.00, 0.85)),
            "GradMask": ((0.08, 0.57), (0.02, 0.845)),
            "FisherMask": ((0.00, 0.80), (0.00, 0.85)),
            "Influence": ((0.82, 0.84), None),
            "SSD": ((0.02, 0.78), None),
            "Head row": ((0.00, 0.849), None),
        },
        "outliers": (0.800, 0.805, 0.812, 0.814, 0.820, 0.1),
        "limited": {
            (0, "ActivationMask"): ((0.03, 0.30), None),
            (0, "FisherMask"): ((0.00, 0.45), None),
            (50, "Finetune"): (None, (0.60, 0.84)),
            (50, "ActivationMask"): ((0.02, 0.40), (0.20, 0.70)),
            (50, "FisherMask"): ((0.00, 0.50), (0.00, 0.85)),
        },
        "ratios": {
            0.0: ((0.0, 0.85), (0.0, 0.85)),
            0.04: ((0.0, 0.80), (0.0, 0.845)),
            0.08: ((0.0, 0.50), (0.0, 0.82)),
            0.12: ((0.0, 0.20), (0.0, 0.70)),
        },
        "schedules": {
            "replay": ((0.02, 0.84), (0.01, 0.84), (0.0, 0.84)),
            "constant 0.1": ((0.02, 0.70), (0.01, 0.72), (0.0, 0.81)),
            "constant 0.01": ((0.30, 0.80), (0.04, 0.80), (0.0, 0.83)),
            "constant 0.001": ((0.60, 0.845), (0.10, 0.84), (0.01, 0.84)),
        },
    },
    "opposite": {
        "retrain": (0.95, 0.1),
        "activation seconds": 5.0,
        "remove-class": {
            "Finetune": (None, (0.00, 0.84), (0.0, 0.07)),
            "RandomMask": ((0.80, 0.66), (0.20, 0.84), (0.0, 0.07)),
            "TF-IDF": ((0.40, 0.42), (0.05, 0.84)),
            "FisherNoise": ((0.50, 0.84), None),
            "ActivationMask": ((0.04, 0.63), (0.30, 0.60), (0.40, 0.0)),
            "GradMask": ((0.08, 0.57), (0.05, 0.82), (0.40, 0.0)),
            "FisherMask": ((0.90, 0.20), (0.20, 0.50), (0.45, 0.05)),
            "Influence": ((0.00, 0.84), None),
            "SSD": ((0.02, 0.78), None),
            "Head row": ((0.00, 0.849), None),
        },
        "outliers": (0.820, 0.815, 0.810, 0.808, 0.806, -0.1),
        "limited": {
            (0, "ActivationMask"): ((0.50, 0.60), None),
            (0, "FisherMask"): ((0.50, 0.45), None),
            (50, "Finetune"): (None, (0.00, 0.84)),
            (50, "ActivationMask"): ((0.20, 0.40), (0.02, 0.86)),
            (50, "FisherMask"): ((0.00, 0.50), (0.30, 0.46)),
        },
        "ratios": {
            0.0: ((0.3, 0.40), (0.3, 0.40), (0.0, 0.2)),
            0.04: ((0.3, 0.80), (0.3, 0.50)),
            0.08: ((0.3, 0.75), (0.3, 0.80)),
            0.12: ((0.3, 0.85), (0.3, 0.85)),
        },
        "schedules": {
            "replay": ((0.90, 0.50), (0.90, 0.50), (0.90, 0.10)),
            "constant 0.1": ((0.60, 0.845), (0.60, 0.845), (0.60, 0.845)),
            "constant 0.01": ((0.30, 0.80), (0.30, 0.80), (0.30, 0.80)),
            "constant 0.001": ((0.02, 0.70), (0.02, 0.70), (0.00, 0.70)),
        },
    },
}


def metrics(forget: float, remain: float) -> dict[str, Any]:
    return {
        "test_forget": forget,
        "test_remain": remain,
        "train_forget": forget,
        "train_remain": min(1.0, remain + 0.1),
        "js_forget": forget / 2,
        "js_remain": (1 - remain) / 4,
        "activation_distance_forget": forget,
        "prediction_distance": 100 * forget,
        "zrf": 1 - forget / 2,
        "relearn_epochs": round(20 * (1 - forget)),
        "mia_confidence": forget,
        "mia_entropy": None,
        "tug_of_war": (1 - forget) * remain,
        "average_gap": forget / 3,
    }


def make_row(
    label: str,
    seed: int,
    start: Pair | None,
    final: Pair | None,
    swing: Pair = (0.0, 0.0),
    *,
    setting: dict[str, Any] | None = None,
    epochs: int = 5,
    original: Pair = ORIGINAL,
    seconds: Pair = (1.5, 10.0),
) -> dict[str, Any]:
    """One run: from ``start``, after masking, to ``final``; remain a bit lower for each seed."""

    def record(stage: str, epoch: int, pair: Pair) -> dict[str, Any]:
        learned = stage == "epoch"
        return {
            "stage": stage,
            "epoch": epoch,
            "lr": 0.1 if learned else None,
            "seconds": 2.0,
            "train_forget": pair[0],
            "train_remain": pair[1],
            "test_forget": pair[0],
            "test_remain": pair[1],
            "loss": 0.5 if learned else None,
        }

    def moved(pair: Pair) -> Pair:
        return pair[0], pair[1] - 0.002 * seed

    history = [record("original", 0, original)]
    begin = end = original
    if start is not None:
        begin = end = moved(start)
        history.append(record("masked", 0, begin))
    if final is not None:
        end = moved(final)
        for epoch in range(1, epochs + 1):
            part = epoch / epochs
            sign = (epoch < epochs) * (1 if epoch % 2 else -1)
            forget, remain = (
                a + part * (b - a) + sign * s for a, b, s in zip(begin, end, swing, strict=True)
            )
            history.append(record("epoch", epoch, (forget, remain)))
    values = random.Random(f"{label} {seed}")
    return {
        "method": label,
        "seed": seed,
        "setting": setting or {},
        "history": history,
        "original": metrics(*original),
        "edited": None if start is None else metrics(*begin),
        "final": metrics(*end),
        "confusion_shift": [[values.uniform(-0.05, 0.05) for _ in CLASSES] for _ in CLASSES],
        "seconds": {"edit": seconds[0] if start else 0.0, "fit": seconds[1] if final else 0.0},
    }


def entry(label: str, method: str) -> dict[str, Any]:
    return {
        "label": label,
        "method": method,
        "definition": "authors" if method == "fisher-mask" else None,
        "options": {"ratio": 0.02} if "mask" in method else {},
        "masks": "mask" in method,
        "control": method == "head-row",
        "beyond_paper": method in ("ssd", "head-row"),
    }


def make_summary(seeds: int = 2, world: str = "paper") -> dict[str, Any]:
    """A whole reproduction."""
    told = WORLDS[world]
    ranks = range(seeds)
    *levels, trend = told["outliers"]
    outliers = ("Finetune", "RandomMask", "ActivationMask", "GradMask", "FisherMask")
    starts = (("Finetune", None), ("ActivationMask", (0.04, 0.63)), ("FisherMask", (0.01, 0.80)))
    experiments = {
        "remove-class": [
            make_row(
                label,
                seed,
                *run,
                seconds=(told["activation seconds"] if label == "ActivationMask" else 1.5, 10.0),
            )
            for label, run in told["remove-class"].items()
            for seed in ranks
        ],
        "outliers": [
            make_row(
                label,
                seed,
                None,
                (level + share * trend * (label == "FisherMask"),) * 2,
                setting={"share": share},
                original=(0.5, 0.78),
            )
            for share in (0.1, 0.3, 0.5)
            for label, level in zip(outliers, levels, strict=True)
            for seed in ranks
        ],
        "limited": [
            make_row(label, seed, *run, setting={"remain_samples": samples})
            for (samples, label), run in told["limited"].items()
            for seed in ranks
        ],
        "ratios": [
            make_row("FisherMask", seed, *run, setting={"ratio": ratio})
            for ratio, run in told["ratios"].items()
            for seed in ranks
        ],
        "schedules": [
            make_row(label, seed, start, final, setting={"schedule": schedule})
            for i, (label, start) in enumerate(starts)
            for schedule, finals in told["schedules"].items()
            for seed, final in ((seed, finals[i]) for seed in ranks)
        ],
    }
    level, duration = told["retrain"]
    references = {
        "remove-class": [
            make_row("Retrain", seed, None, (0.0, level), epochs=20, original=(0.1, 0.1))
            for seed in range(3)
        ],
        "outliers": [
            make_row("Retrain", seed, None, (0.847, 0.844), setting={"share": share}, epochs=20)
            for share in (0.1, 0.3, 0.5)
            for seed in range(3)
        ],
    }
    for row in references["remove-class"] + references["outliers"]:
        row["seconds"] = {"edit": 0.0, "fit": duration + row["seed"]}
    summary = {
        "format": "fastfisher.reproduce/1",
        "fastfisher": "0.4",
        "command": "fastfisher reproduce cifar10-resnet20 --budget small",
        "recipe": {
            "name": "cifar10-resnet20",
            "title": "ResNet-20 on CIFAR-10, class 0 (airplane) removed",
            "version": 1,
            "text": "Section 4 of the paper at a small budget.",
            "seeds": list(ranks),
            "train": {"epochs": 20, "lr": 0.1},
        },
        "budget": "small",
        "data": {
            "name": "cifar10",
            "classes": CLASSES,
            "train": 50000,
            "test": 10000,
            "forget": 5000,
            "remain": 45000,
        },
        "environment": {"processor": "a CPU", "torch": "2.14", "threads": 1, "device": "cpu"},
        "methods": [entry(label, method) for label, method in METHODS.items()],
        "experiments": experiments,
        "references": references,
        "audits": {
            "budget": {"shadows": 8},
            "rows": [
                {
                    "method": "FisherMask",
                    "seed": seed,
                    "rmia_auc": 0.52 + seed / 100,
                    "ulira_auc": None,
                    "ulira_tpr": {"0.01": 0.02},
                }
                for seed in ranks
            ],
        },
        "tasks": {"count": 120, "seconds": 512.3},
    }
    return dict(json.loads(json.dumps(summary)))


def bare() -> dict[str, Any]:
    """A recipe of which nothing ran."""
    summary = make_summary()
    return {**summary, "experiments": {}, "references": {}, "audits": {}}


def verdict(summary: dict[str, Any], words: str) -> Any:
    (claim,) = [claim for claim in CLAIMS if words in claim.text]
    return claim.check(summary)


def cells(summary: dict[str, Any], name: str) -> dict[str, list[str]]:
    table = tables(summary)[name].table
    assert table is not None
    return {row[0]: list(row[1:]) for row in table.rows}


# Means, spreads, gaps


def test_the_spread_is_that_of_a_sample() -> None:
    assert stat([0.1, 0.2, 0.6]) == Stat(pytest.approx(0.3), pytest.approx(0.07**0.5), 3, 3)
    assert stat([0.5]) == Stat(0.5, None, 1, 1)
    assert stat([None, 0.5, float("nan")]) == Stat(0.5, None, 1, 3)
    assert stat([None]) is None and stat([]) is None


def test_a_measure_is_of_one_setting_and_one_stage() -> None:
    summary = make_summary()

    def mean(*place: str, **more: Any) -> float:
        found = measure(summary, *place, **more)
        assert found is not None and found.count == 2
        return found.mean

    assert mean("remove-class", "TF-IDF", "test_remain") == pytest.approx(0.849)
    assert mean("remove-class", "TF-IDF", "test_remain", stage="edited") == pytest.approx(0.419)
    assert mean("remove-class", "Finetune", "test_remain", stage="start") == pytest.approx(0.85)
    assert measure(summary, "remove-class", "Finetune", "test_remain", stage="edited") is None
    half = mean("outliers", "FisherMask", "test_remain", setting={"share": 0.5})
    assert half == pytest.approx(0.869)
    assert measure(summary, "remove-class", "Finetune", "no such metric") is None


def test_outliers_have_retrained_models_of_their_own() -> None:
    summary = make_summary()
    for row in summary["references"]["outliers"]:
        row["final"]["test_remain"] = row["setting"]["share"]
    found = reference(summary, "outliers", "test_remain", {"share": 0.3})
    assert found is not None and found.mean == pytest.approx(0.3) and found.count == 3
    shared = reference(summary, "ratios", "test_remain", {"ratio": 0.04})
    assert shared is not None and shared.mean == pytest.approx(0.848)


@pytest.mark.parametrize(("mean", "inside"), [(0.82, False), (0.83, True), (0.85, True)])
def test_a_gap_inside_the_spread_is_marked(mean: float, inside: bool) -> None:
    retrained = Stat(0.84, 0.015, 3, 3)
    found = gap(Stat(mean, None, 1, 1), retrained)
    assert found is not None
    assert (found.difference, found.spread) == (pytest.approx(mean - 0.84), 0.015)
    assert found.inside is inside
    alone = gap(Stat(mean, None, 1, 1), Stat(0.84, None, 1, 1))
    assert alone is not None and alone.inside is None
    assert gap(None, retrained) is None and gap(retrained, None) is None


@pytest.mark.parametrize(
    "values", [[0.5, 0.7, 0.6, 0.8], [0.8, 0.1, 0.9, 0.8, 0.85], [0.1, 0.2, 0.2]]
)
def test_volatility_and_the_formula_of_the_paper(values: list[float]) -> None:
    epochs = len(values) - 1  # |T|: the curve has a value before the first epoch
    assert volatility(values) == pytest.approx(
        sum(abs(values[t] - values[t - 1]) for t in range(1, epochs + 1)) / epochs
    )
    remain = sum(values[t] - values[t - 1] for t in range(1, epochs + 1)) / (epochs - 1)
    forget = sum(values[t] - values[t + 1] for t in range(epochs)) / (epochs - 1)
    assert paper_volatility(values, forget=False) == pytest.approx(remain)
    assert paper_volatility(values, forget=True) == pytest.approx(forget)


def test_no_volatility_without_a_whole_curve() -> None:
    assert volatility([0.5]) is None and volatility([0.5, None, 0.6]) is None
    assert paper_volatility([0.5, 0.6], forget=True) is None  # one epoch: division by zero
    assert paper_volatility([0.5, None, 0.6], forget=True) is None


def test_table_1_takes_the_model_that_fine_tuning_starts_from() -> None:
    found = {row.label: row for row in masked_rows(make_summary(seeds=1))}
    finetune, tfidf, noise = (found[label] for label in ("Finetune", "TF-IDF", "FisherNoise"))
    assert finetune.forget == Stat(0.88, None, 1, 1)  # the original
    assert tfidf.forget == Stat(0.40, None, 1, 1)
    # Five equal steps, from 0.42 to 0.85 and from 0.40 to 0.05; the formula divides by four.
    assert tfidf.remain_volatility is not None and tfidf.remain_formula is not None
    assert tfidf.remain_volatility.mean == pytest.approx(0.43 / 5)
    assert tfidf.remain_formula.mean == pytest.approx(0.43 / 4)
    assert tfidf.forget_formula is not None
    assert tfidf.forget_formula.mean == pytest.approx(0.35 / 4)
    assert noise.remain_volatility is None and noise.remain_formula is None


# Claims

OPEN = {
    "especially on CIFAR100 and MNIST",
    "It may because that randomly",
    "information in the BatchNorm layer",
    "TF-IDF method on Tiny-ImageNet",
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:50])
def test_a_verdict_flips_when_the_numbers_flip(claim: Any) -> None:
    found = [claim.check(make_summary(world=world)).agrees for world in ("paper", "opposite")]
    if any(words in claim.text for words in OPEN):
        assert found == ["not measured", "not measured"]
    elif "best stability" in claim.text:
        # Finetune's remain accuracy moves less, which is what the paper's Table 1 says as well.
        assert found == ["partly", "no"]
    else:
        assert found == ["yes", "no"]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:50])
def test_no_claim_is_judged_without_its_numbers(claim: Any) -> None:
    assert claim.check(bare()).agrees == "not measured"


def test_every_part_of_section_4_has_claims() -> None:
    assert {claim.section for claim in CLAIMS} == {"Figure 1", *(f"4.{i}" for i in range(1, 6))}
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)


def test_a_verdict_says_its_numbers_and_its_rule() -> None:
    found = verdict(make_summary(), "maintains 87%")
    assert found.measured == (
        "FisherMask without fine-tuning keeps 94.0% of the original remain accuracy "
        "(79.9%\u00a0±\u00a00.1 of 85.0%\u00a0±\u00a00.0) at 0.0%\u00a0±\u00a00.0 forget "
        "accuracy. Yes: at least 87% kept and at most 5% forget accuracy; partly: one of the two."
    )


def test_a_threshold_decides() -> None:
    summary = make_summary(seeds=1)
    (row,) = [r for r in summary["experiments"]["remove-class"] if r["method"] == "FisherMask"]
    agrees = []
    for remain, forget in ((0.87, 0.05), (0.869, 0.05), (0.87, 0.051), (0.869, 0.051)):
        row["edited"].update(test_remain=remain, test_forget=forget)
        row["original"]["test_remain"] = 1.0
        agrees.append(verdict(summary, "maintains 87%").agrees)
    assert agrees == ["yes", "partly", "partly", "no"]


def test_a_lead_within_the_spread_counts_as_partly() -> None:
    summary = make_summary()
    for row in summary["experiments"]["limited"]:
        if row["setting"] == {"remain_samples": 0}:
            shift = 0.02 if row["method"] == "FisherMask" else 0.0
            row["edited"]["test_remain"] = 0.4 + shift + 0.1 * row["seed"]
    assert verdict(summary, "has a lower remain accuracy compared").agrees == "partly"


def test_each_definition_is_judged_by_itself() -> None:
    summary = make_summary()
    summary["methods"].append({**entry("FisherMask, text", "fisher-mask"), "definition": "paper"})
    for row in copy.deepcopy(summary["experiments"]["remove-class"]):
        if row["method"] == "FisherMask":
            row["edited"]["test_remain"] = 0.11
            summary["experiments"]["remove-class"].append({**row, "method": "FisherMask, text"})
    found = verdict(summary, "maintains 87%")
    assert found.agrees == "partly"
    assert "[authors: yes] FisherMask without" in found.measured
    assert "[paper: partly] FisherMask, text without" in found.measured
    # A claim that has nothing to do with FisherMask is told once.
    assert verdict(summary, "FisherNoise can almost").measured.count("FisherNoise") == 1


def test_controls_and_methods_beyond_the_paper_take_no_part() -> None:
    summary = make_summary()
    for row in summary["experiments"]["remove-class"]:
        if row["method"] in ("SSD", "Head row"):
            row["edited"].update(test_forget=0.0, test_remain=0.99)
    found = verdict(summary, "performs best when unlearning with only masking")
    assert found.agrees == "yes" and "SSD" not in found.measured


def test_a_claim_on_one_data_set_is_judged_on_that_data_set() -> None:
    summary = make_summary()
    summary["data"]["name"] = "mnist"
    assert verdict(summary, "On the dataset CIFAR10/100").agrees == "not measured"
    words = "TF-IDF method on Tiny-ImageNet"
    summary["data"]["name"], summary["recipe"]["name"] = "tiny-imagenet", "tiny-densenet"
    assert verdict(summary, words).agrees == "no"
    for row in summary["experiments"]["remove-class"]:
        if row["method"] == "TF-IDF":
            for place, record in enumerate(row["history"][1:]):
                record["test_forget"] = 0.2 * place
    assert verdict(summary, words).agrees == "yes"


# Tables


def test_the_table_beside_the_retrained_models() -> None:
    found = cells(make_summary(), "tuned")
    assert list(found)[:3] == ["Original", "Retrain", "Finetune"]
    assert found["Retrain"][:4] == ["0.0 ± 0.0", "-", "84.8 ± 0.2", "-"]
    assert found["Finetune"][:4] == ["35.0 ± 0.0", "+35.0", "84.9 ± 0.1", "≈ +0.1"]
    assert found["SSD"][2:4] == ["77.9 ± 0.1", "-6.9"]


def test_table_2_has_a_pair_of_columns_for_each_share() -> None:
    summary = make_summary(seeds=1)
    section = tables(summary)["outliers"]
    assert section.table is not None
    assert section.table.heads[1:] == (
        "10% test", "10% noise", "30% test", "30% noise", "50% test", "50% noise",
    )  # fmt: skip
    found = cells(summary, "outliers")
    assert found["Retrain"][:2] == ["84.2 ± 0.2", "84.7 ± 0.0"]
    assert found["FisherMask"] == ["83.0", "83.0", "85.0", "85.0", "87.0", "87.0"]


def test_the_remaining_tables_say_what_was_measured() -> None:
    summary = make_summary(seeds=1)
    assert cells(summary, "times")["FisherMask"] == ["1.500", "10.0", "11.5", "34.9×"]
    assert cells(summary, "audits")["FisherMask"] == ["0.520", "-", "2.0"]
    assert cells(summary, "gaps")["spread of Retrain"][1] == "0.2"
    assert cells(summary, "gaps")["GradMask"][:2] == ["+2.0", "-0.3"]
    assert cells(summary, "limited")["Finetune"] == ["50", "88.0", "85.0", "60.0", "84.0"]
    assert cells(summary, "ratios")["FisherMask"] == ["0.12", "0.0", "20.0", "0.0", "70.0", "10.00"]
    assert cells(summary, "schedules")["Finetune"][:3] == ["constant 0.001", "60.0", "84.5"]
    assert cells(summary, "methods")["SSD"][2] == "beyond"


def test_a_metric_that_some_seeds_lack_says_so() -> None:
    summary = make_summary()
    for row in summary["experiments"]["remove-class"]:
        row["final"]["zrf"] = 0.25 if row["seed"] == 0 else None
        row["final"]["a new one"] = 2.0
    section = tables(summary)["metrics"]
    assert section.table is not None
    heads = list(section.table.heads)[1:]
    found = dict(zip(heads, cells(summary, "metrics")["SSD"], strict=True))
    assert found["ZRF"] == "0.250 (1 of 2)"
    assert found["a new one"] == "2.000 ± 0.000"
    assert "MIA, entropy" not in heads  # null everywhere


def test_the_closest_method_is_no_control() -> None:
    summary = make_summary()
    found = cells(summary, "tuned")
    assert found["Head row"][0] == "0.0 ± 0.0"
    assert closest(summary) == ("ActivationMask", pytest.approx(0.0005))
    assert "Of all methods ActivationMask ends closest to the retrained models" in headline(summary)
    counts = re.findall(r"(\d+) (?:agree with|agree partly|do not|were not)", headline(summary))
    assert sum(map(int, counts)) == len(CLAIMS) and counts[-1] == "4"


# The page


def test_the_page_shows_every_experiment() -> None:
    text = reproduction_page(make_summary())
    checked = Checker(text)
    for words in ("Table 1", "Table 2", *(f"Figure {i}" for i in range(1, 6)), "Run time"):
        assert f"{words})</h2>" in text or f"<h2>{words}</h2>" in text
    charts = re.findall(r'<svg class="chart lines".*?</svg>', text, re.DOTALL)
    # Figures 2 (paper, others), 1, 3, 4, 5.
    assert len(charts) == 2 + 2 + 1 + 2 + 2 + 3
    assert text.count('class="panels small"') == 1
    heads = [table[0] for table in checked.tables]
    assert ["section", "agrees", "claim", "measured here"] in heads
    assert "fastfisher reproduce cifar10-resnet20 --budget small" in checked.words
    for claim in CLAIMS:
        assert claim.text in checked.words


def test_a_method_keeps_its_style() -> None:
    text = reproduction_page(make_summary())
    styles: dict[str, set[str]] = {}
    for key, label in re.findall(r'<g class="mark (s\d+)">.*?</svg>([^<]*)</li>', text):
        styles.setdefault(label.split(",")[0], set()).add(key)
    assert len(styles["FisherMask"]) == 1
    assert len(set.union(*(styles[label] for label in METHODS))) == len(METHODS)
    assert "s9" not in set.union(*styles.values())  # the grey of the retrained models


def test_no_remain_data_is_a_star() -> None:
    summary = make_summary(seeds=1)
    text = reproduction_page(summary)
    stars = re.findall(r"<title>(\w+), no remain data: ([\d.]+)%</title>", text)
    assert stars == [("ActivationMask", "3.00"), ("FisherMask", "0.00"),
                     ("ActivationMask", "30.00"), ("FisherMask", "45.00")]  # fmt: skip


def test_the_page_needs_nothing_from_outside() -> None:
    text = reproduction_page(make_summary())
    checked = Checker(text)
    tags = {tag for tag, _, _ in checked.attributes} | set(re.findall(r"<(\w+)", text))
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    assert not {name for _, name, _ in checked.attributes} & {"src", "href", "srcset", "style"}
    assert not re.search(r"https?:|//|url\(|@import", text)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    "left_out", ["remove-class", "outliers", "limited", "ratios", "schedules", "references"]
)
def test_what_did_not_run_is_left_out(left_out: str, seeds: int) -> None:
    summary = make_summary(seeds)
    summary["experiments"].pop(left_out, None)
    summary.pop(left_out, None)
    summary.pop("audits")
    present = tables(summary)
    assert left_out not in present and "audits" not in present
    assert ("tuned" in present) is (left_out != "remove-class")
    for text in (reproduction_page(summary), results_page(summary)):
        assert ("as Table 2" in text) is (left_out != "outliers")
        assert ("as Figure 1" in text) is (left_out != "remove-class" and "<h2>" in text)


def test_nothing_but_the_recipe() -> None:
    assert list(tables(bare())) == ["claims", "methods"]
    assert "ends closest" not in headline(bare())
    assert f"{len(CLAIMS)} were not measured" in Checker(reproduction_page(bare())).words
    assert "not measured" in results_page(bare())


def test_nulls_are_dashes() -> None:
    summary = make_summary()
    for row in [*summary["experiments"]["remove-class"], *summary["references"]["remove-class"]]:
        row["final"] = dict.fromkeys(row["final"])
        row["edited"] = None
        row["confusion_shift"] = None
        for record in row["history"]:
            record.update(dict.fromkeys(("test_forget", "test_remain", "lr", "loss")))
    assert cells(summary, "tuned")["SSD"] == ["-"] * 6
    text = reproduction_page(summary)
    assert "panels small" not in text and "None" not in Checker(text).words
    assert "None" not in results_page(summary)


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "a & b", '"quoted"', "</style>", "a|b", "*a* `b`"]
)
def test_all_text_is_escaped(text: str) -> None:
    written = json.dumps(make_summary(seeds=1)).replace("FisherMask", json.dumps(text)[1:-1])
    summary = json.loads(written)
    summary["recipe"].update(title=text, text=text)
    summary["data"]["classes"][0] = text
    summary["environment"]["processor"] = text
    page = reproduction_page(summary)
    checked = Checker(page)
    assert checked.words.count(text) >= 20
    assert not {tag for tag, _, _ in checked.attributes} & {"script"}
    if text.startswith("<"):
        assert page.count(text) == (1 if text == "</style>" else 0)
    for chart in re.findall(r'<svg class="chart.*?</svg>', page, re.DOTALL):
        ElementTree.fromstring(chart)
    markdown = results_page(summary)
    assert text not in markdown or text in ('"quoted"',)
    shown = re.sub(r"\\(.)", r"\1", markdown)
    assert shown.count(text) >= 20


def test_another_format_is_refused() -> None:
    summary = {**make_summary(), "format": "fastfisher.unlearn/1"}
    for write in (reproduction_page, results_page):
        with pytest.raises(ValueError, match=r"^summary: expected one of format 'fastfisher.repro"):
            write(summary)


# Markdown


def test_the_markdown_tables_are_whole() -> None:
    summary = make_summary()
    text = results_page(summary)
    assert text == results_page(copy.deepcopy(summary))
    assert text.startswith("# ResNet-20 on CIFAR-10, class 0 (airplane) removed\n\n")
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    # Every table of the page, and the curves.
    assert len(blocks) == len(tables(summary)) + 1
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "| TF-IDF | 5.0 ± 0.0 | +5.0 | 84.9 ± 0.1 | ≈ +0.1 |" in text
    assert "| TF-IDF | 88.0 / 85.0 | 40.0 / 41.9 | 33.0 / 50.5 |" in text
    assert "\n    fastfisher reproduce cifar10-resnet20 --budget small\n" in text


# Charts


def test_a_heat_map_is_signed_and_to_scale() -> None:
    drawn = heat_map(
        [[0.1, -0.2], [0.0, 0.4]], title="t", rows=["a", "b"], columns=["c", "d"], scale=0.4
    )
    ElementTree.fromstring(drawn)
    found = re.findall(r'class="(more|less)".*?fill-opacity="(.*?)"', drawn)
    assert found == [("more", "0.25"), ("less", "0.50"), ("less", "0.00"), ("more", "1.00")]
    assert re.findall(r"<title>(.*?)</title>", drawn) == [
        "a as c: +10.0 points", "a as d: -20.0 points", "b as c: +0.0 points",
        "b as d: +40.0 points",
    ]  # fmt: skip


def test_of_many_classes_those_that_moved_most_are_shown() -> None:
    summary = make_summary(seeds=1)
    summary["data"]["classes"] = [f"class {i}" for i in range(30)]
    for row in summary["experiments"]["remove-class"]:
        shift = [[0.0] * 30 for _ in range(30)]
        for i in range(18, 30):
            shift[i][i] = -0.3
        row["confusion_shift"] = shift
    text = reproduction_page(summary)
    assert "Shown: the 12 of 30 classes that moved most." in text
    assert "The full colour is 30.0 points." in text
    drawn = re.findall(r"<title>(class \d+) as class 29: ([-+.\d]+) points</title>", text)[:12]
    assert drawn == [(f"class {i}", "-30.0" if i == 29 else "+0.0") for i in range(18, 30)]


def test_dashed_lines_and_stars_are_told_apart() -> None:
    lines = [
        Line("a", 0, [(0, 0.1), (1, 0.2)]),
        Line("b", 10, [(0, 0.1), (1, 0.3)], dashed=True),
        Line("c", 20, [(1, 0.4)], star=True),
    ]
    ticks = [(0.0, "0"), (1.0, "1")]
    drawn = line_chart(lines, title="t", x_ticks=ticks, x_label="x", y_label="y")
    assert re.findall(r'<polyline class="(.*?)"', drawn) == ["line s0", "line dashed s10"]
    shapes = re.findall(r'class="mark s\d+" transform="[^"]*">(<.*?/>)<title>', drawn)
    # Styles 0 and 10 have the same colour; their markers differ, and the star differs from both.
    assert [shapes[i] == shapes[j] for i, j in ((0, 1), (2, 3))] == [True, True]
    assert len({shapes[0], shapes[2], shapes[4]}) == 3 and len(shapes) == 5
