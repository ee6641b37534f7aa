"""What a reproduction measured is aggregated, judged and shown as it is."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

PAPER = {
    # label: method, accuracies (forget, remain) right after masking and at the end
    "Finetune": ("finetune", None, (0.30, 0.84)),
    "RandomMask": ("random-mask", (0.80, 0.66), (0.20, 0.84)),
    "TF-IDF": ("tf-idf", (0.40, 0.42), (0.05, 0.82)),
    "FisherNoise": ("fisher-noise", (0.00, 0.30), None),
    "ActivationMask": ("activation-mask", (0.04, 0.63), (0.005, 0.835)),
    "GradMask": ("grad-mask", (0.08, 0.57), (0.02, 0.80)),
    "FisherMask": ("fisher-mask", (0.01, 0.80), (0.00, 0.84)),
    "Influence": ("influence", (0.82, 0.84), None),
    "SSD": ("ssd", (0.02, 0.78), None),
    "Head row": ("head-row", (0.00, 0.85), None),
}
ORIGINAL = (0.88, 0.85)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def metrics(forget: float, remain: float) -> dict[str, float | None]:
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
    start: tuple[float, float] | None,
    final: tuple[float, float] | None,
    *,
    setting: dict[str, Any] | None = None,
    epochs: int = 5,
    original: tuple[float, float] = ORIGINAL,
) -> dict[str, Any]:
    """One run: from ``start``, after masking, straight to ``final``; a bit off by seed."""
    shift = 0.002 * seed

    def record(stage: str, epoch: int, pair: tuple[float, float]) -> dict[str, Any]:
        forget, remain = pair
        learned = stage == "epoch"
        return {
            "stage": stage,
            "epoch": epoch,
            "lr": 0.1 if learned else None,
            "seconds": 2.0,
            "train_forget": forget,
            "train_remain": remain,
            "test_forget": forget,
            "test_remain": remain,
            "loss": 0.5 if learned else None,
        }

    def moved(pair: tuple[float, float]) -> tuple[float, float]:
        return min(1.0, pair[0] + (shift if pair[0] > 0.01 else 0)), pair[1] - shift

    history = [record("original", 0, original)]
    begin = original
    if start is not None:
        begin = moved(start)
        history.append(record("masked", 0, begin))
    end = begin
    if final is not None:
        end = moved(final)
        for epoch in range(1, epochs + 1):
            part = epoch / epochs
            pair = tuple(a + part * (b - a) for a, b in zip(begin, end, strict=True))
            history.append(record("epoch", epoch, pair))
    generator = random.Random(f"{label} {seed}")
    return {
        "method": label,
        "seed": seed,
        "setting": setting or {},
        "history": history,
        "original": metrics(*original),
        "edited": None if start is None else metrics(*begin),
        "final": metrics(*end),
        "confusion_shift": [[generator.uniform(-0.05, 0.05) for _ in CLASSES] for _ in CLASSES],
        "seconds": {"edit": 1.5 if start else 0.0, "fit": 10.0 if final else 0.0},
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


def make_summary(seeds: int = 2) -> dict[str, Any]:
    """A whole reproduction in which the paper's claims hold."""
    outliers = {
        "Finetune": 0.800,
        "RandomMask": 0.805,
        "ActivationMask": 0.812,
        "GradMask": 0.814,
        "FisherMask": 0.820,
    }
    ranks = range(seeds)
    found: dict[str, list[dict[str, Any]]] = {
        "remove-class": [
            make_row(label, seed, start, final)
            for label, (_, start, final) in PAPER.items()
            for seed in ranks
        ],
        "outliers": [
            make_row(
                label,
                seed,
                None,
                # FisherMask's lead grows with the share.
                (level + share * (label == "FisherMask") / 10,) * 2,
                setting={"share": share},
                original=(0.5, 0.78),
            )
            for share in (0.1, 0.3, 0.5)
            for label, level in outliers.items()
            for seed in ranks
        ],
        "limited": [
            make_row(label, seed, start, final, setting={"remain_samples": count})
            for count, label, start, final in (
                (0, "ActivationMask", (0.03, 0.30), None),
                (0, "FisherMask", (0.00, 0.45), None),
                (50, "Finetune", None, (0.60, 0.84)),
                (50, "ActivationMask", (0.02, 0.40), (0.20, 0.70)),
                (50, "FisherMask", (0.00, 0.50), (0.00, 0.85)),
            )
            for seed in ranks
        ],
        "ratios": [
            make_row("FisherMask", seed, (0.0, start), (0.0, end), setting={"ratio": ratio})
            for ratio, start, end in (
                (0.0, 0.85, 0.85),
                (0.04, 0.80, 0.845),
                (0.08, 0.5, 0.82),
                (0.12, 0.2, 0.7),
            )
            for seed in ranks
        ],
        "schedules": [
            make_row(label, seed, start, final, setting={"schedule": schedule})
            for label, start, ends in (
                ("Finetune", None, ((0.15, 0.84), (0.02, 0.70), (0.30, 0.80), (0.60, 0.845))),
                (
                    "ActivationMask",
                    (0.04, 0.63),
                    ((0.01, 0.84), (0.01, 0.72), (0.04, 0.80), (0.10, 0.84)),
                ),
                ("FisherMask", (0.01, 0.80), ((0.0, 0.84), (0.0, 0.81), (0.0, 0.83), (0.01, 0.84))),
            )
            for schedule, final in zip(
                ("replay", "constant 0.1", "constant 0.01", "constant 0.001"), ends, strict=True
            )
            for seed in ranks
        ],
    }
    references = {
        "remove-class": [
            make_row("Retrain", seed, None, (0.0, 0.85), epochs=20, original=(0.1, 0.1))
            for seed in range(3)
        ],
        "outliers": [
            make_row("Retrain", seed, None, (0.847, 0.844), setting={"share": share}, epochs=20)
            for share in (0.1, 0.3, 0.5)
            for seed in range(3)
        ],
    }
    for row in references["remove-class"] + references["outliers"]:
        row["seconds"] = {"edit": 0.0, "fit": 400.0 + row["seed"]}
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
        "methods": [entry(label, method) for label, (method, *_) in PAPER.items()],
        "experiments": found,
        "references": references,
        "audits": {
            "budget": {"shadows": 8},
            "rows": [
                {
                    "method": "FisherMask",
                    "seed": s,
                    "rmia_auc": 0.52,
                    "ulira_auc": None,
                    "ulira_tpr": {"0.01": 0.02},
                }
                for s in ranks
            ],
        },
        "tasks": {"count": 120, "seconds": 512.3},
    }
    return copy.deepcopy(json.loads(json.dumps(summary)))
