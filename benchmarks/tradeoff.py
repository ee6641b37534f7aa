"""How much of a class can be forgotten, at what loss, by masking alone: the weight decides.

    python benchmarks/tradeoff.py                                        # digits, half a minute
    python benchmarks/tradeoff.py --full --data-root data --save docs/results/trade-off

A net is trained for a few epochs, one Fisher pass over its training images gives F of every class,
and for each class to forget three masks are compared right after masking: w = 1 (how the paper's
authors weigh), w = |D_r| / |D_f| (the paper's text), each with the ratio that is best for it, and
what ``search_mask`` chooses. Held-out training images decide everything; test images are only
counted. With ``--save`` each trained net's rows are written as soon as they are there, and a
repeated command goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastfisher import doctor
from fastfisher.data import (
    DataBundle,
    batches,
    load_dataset,
    size_of,
    split_forget,
    subset,
    targets_of,
)
from fastfisher.files import replacing
from fastfisher.fisher_diag import FisherDiag, fisher_diag
from fastfisher.masking import plan_masks
from fastfisher.models import build
from fastfisher.unlearning import Candidate, TrainRecipe, accuracy, search_mask, train
from fastfisher.unlearning.metrics import accuracy_and_loss
from fastfisher.unlearning.search import RATIOS, choose, hold_out

HELD_FORGET, HELD_REMAIN = 300, 1000
MAX_FORGET, TIE = 0.005, 0.001
"""As of ``search_mask``."""


@dataclass(frozen=True)
class Point:
    """A mask and the four accuracies after it, in [0, 1]; w and R are ``None`` without a mask."""

    remain_weight: float | None
    ratio: float | None
    unit: str | None
    scope: str | None
    held_forget: float
    held_remain: float
    test_forget: float
    test_remain: float


@dataclass(frozen=True)
class Row:
    """One class of one trained net.

    Attributes:
        original: without a mask.
        authors: w = 1, with the best R.
        paper: w = |D_r| / |D_f|, with the best R.
        chosen: by the search.
        masks: evaluated by the search.
        grid: masks in its grid.
        train_seconds: of the net, of all its classes together.
        fisher_seconds: the same for the Fisher.
        search_seconds: of this class.
    """

    data: str
    net: str
    seed: int
    forget_class: int
    original: Point
    authors: Point
    paper: Point
    chosen: Point
    masks: int
    grid: int
    train_seconds: float
    fisher_seconds: float
    search_seconds: float


def rows_of_net(
    bundle: DataBundle, net: str, seed: int, classes: Sequence[int], recipe: TrainRecipe
) -> Iterator[Row]:
    """Train one net, and measure each class to forget."""
    torch.manual_seed(seed)
    sizes = {"in_channels": bundle.in_channels, "image_size": bundle.image_size}
    model = build(net, num_classes=bundle.num_classes, **sizes)
    start = time.perf_counter()
    train(model, bundle.train, recipe, seed=seed)
    trained = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    cap = HELD_FORGET * bundle.num_classes
    scored, held = hold_out(bundle.train, cap=cap, generator=generator)
    # In order of the classes a batch holds one or two of them, which is the fastest for groups.
    by_class = subset(scored, targets_of(scored).argsort(stable=True))
    fishers = fisher_diag(model, batches(by_class, 128), groups="target")
    scored_at = time.perf_counter()
    for forget_class in classes:
        held_forget, others = split_forget(held, forget_class=forget_class)
        order = torch.randperm(size_of(others), generator=generator)[:HELD_REMAIN]
        test = split_forget(bundle.test, forget_class=forget_class)
        found = _masks_of_class(
            model,
            (fishers[forget_class], fishers.without(forget_class)),
            (held_forget, subset(others, order)),
            test,
        )
        yield Row(
            data=bundle.name,
            net=net,
            seed=seed,
            forget_class=forget_class,
            train_seconds=trained - start,
            fisher_seconds=scored_at - trained,
            **found,
        )


def _masks_of_class(
    model: nn.Module,
    fishers: tuple[FisherDiag, FisherDiag],
    held: tuple[Dataset[Any], Dataset[Any]],
    test: tuple[Dataset[Any], Dataset[Any]],
) -> dict[str, Any]:
    """What a row has of one class."""
    held_batches = [list(batches(part, 128)) for part in held]

    def accuracies(candidate: Candidate | None) -> Point:
        sets = [*held_batches, *(list(batches(part, 128)) for part in test)]
        if candidate is None:
            return Point(None, None, None, None, *(accuracy(model, part) for part in sets))
        [plan] = plan_masks(
            model,
            *fishers,
            ratios=[candidate.ratio],
            remain_weight=candidate.remain_weight,
            granularity=candidate.granularity,
            scope=candidate.scope,
        )
        mask = plan.apply_()
        try:
            values = [accuracy(model, part) for part in sets]
        finally:
            mask.undo_(model)
        return Point(
            candidate.remain_weight,
            candidate.ratio,
            candidate.granularity,
            str(candidate.scope),
            *values,
        )

    def best_ratio(weight: float) -> Candidate:
        found = []
        for plan in plan_masks(model, *fishers, ratios=RATIOS, remain_weight=weight):
            mask = plan.apply_()
            try:
                forget = accuracy(model, held_batches[0])
                remain, loss = accuracy_and_loss(model, held_batches[1])
            finally:
                mask.undo_(model)
            found.append(
                Candidate(weight, plan.ratio, "parameter", "global", mask.k, forget, remain, loss)
            )
        return choose(found, MAX_FORGET, TIE)

    start = time.perf_counter()
    search = search_mask(model, *fishers, *held_batches, max_forget=MAX_FORGET, tie=TIE)
    seconds = time.perf_counter() - start
    forget_fisher, remain_fisher = fishers
    return {
        "original": accuracies(None),
        "authors": accuracies(best_ratio(1.0)),
        "paper": accuracies(best_ratio(remain_fisher.samples / forget_fisher.samples)),
        "chosen": accuracies(search.chosen),
        "masks": len(search.candidates),
        "grid": search.grid,
        "search_seconds": seconds,
    }


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    environment, settings = document["environment"], document["settings"]
    rows = sorted(document["rows"], key=_place)
    lines = [
        "# The weight of the remain Fisher decides what masking loses",
        "",
        "One class is forgotten by masking alone, without fine-tuning: the weights with the "
        "largest F_f - w F_r are zeroed. Accuracies in percent. Held out: training images that "
        f"the Fisher has not seen, at most {HELD_FORGET} of the class and {HELD_REMAIN} of the "
        "others; they decide w, R, unit and scope. Test images decide nothing. w = 1 and "
        "w = |D_r| / |D_f| have the R, of those searched, that is best for them on the same "
        "images, scalar units and one ranking.",
        "",
        f"Nets: {settings['epochs']} epochs, one-cycle, bfloat16. Ran on: {environment['cpu']}, "
        f"{environment['threads']} threads, torch {environment['torch']}, {environment['date']}.",
        "",
        "## Over all classes and seeds",
        "",
        f"Forgotten: at most {100 * MAX_FORGET:g}% of the class left on test. Then the mean test "
        "accuracy of the forgotten class and the mean change of the others'.",
        "",
        "| data | net | cases | w = 1: forgotten | forget | remain | paper's w: forgotten | forget "
        "| remain | searched: forgotten | forget | remain | w, median (range) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (data, net), group in groupby(rows, key=lambda row: (row["data"], row["net"])):
        cases = list(group)
        weights = [row["chosen"]["remain_weight"] for row in cases]
        cells = [data, net, str(len(cases))]
        for key in ("authors", "paper", "chosen"):
            forget = [row[key]["test_forget"] for row in cases]
            change = [row[key]["test_remain"] - row["original"]["test_remain"] for row in cases]
            cells += [
                str(sum(value <= MAX_FORGET for value in forget)),
                f"{100 * statistics.mean(forget):.1f}",
                f"{100 * statistics.mean(change):+.1f}",
            ]
        cells.append(f"{statistics.median(weights):.3g} ({min(weights):.3g} to {max(weights):.3g})")
        lines.append(f"| {' | '.join(cells)} |")
    masks, grid = (statistics.mean(row[key] for row in rows) for key in ("masks", "grid"))
    lines += [
        "",
        f"A search evaluated {masks:.0f} masks on average, of a grid of {grid:.0f}.",
        "",
        "## Each class",
        "",
        "Cells: held-out forget / remain, then test forget / remain. In brackets R; for the search "
        "w, R, unit and scope.",
        "",
        "| data, net, seed | class | original | w = 1 | w = D_r / D_f | searched | search, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['data']}, {row['net']}, {row['seed']}", str(row["forget_class"])]
        for key in ("original", "authors", "paper", "chosen"):
            point = row[key]
            cells.append(
                "{}; {}".format(
                    *(
                        f"{100 * point[f'{part}_forget']:.1f} / {100 * point[f'{part}_remain']:.1f}"
                        for part in ("held", "test")
                    )
                )
            )
            if key in ("authors", "paper"):
                cells[-1] += f" ({point['ratio']:g})"
            elif key == "chosen":
                how = f"{point['remain_weight']:.3g}, {point['ratio']:g}"
                cells[-1] += f" ({how}, {point['unit']}, {point['scope']})"
        cells.append(f"{row['search_seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["data"], row["net"], row["seed"], row["forget_class"]


def _load(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same settings."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = document["rows"] if document["settings"] == settings else []
    return rows


def _save(stem: Path, document: dict[str, Any]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1) + "\n"
    for suffix, content in ((".json", text), (".md", page(document))):
        with replacing(stem.with_suffix(suffix)) as temporary:
            temporary.write_text(content, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and save if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="real images, two nets, two seeds")
    parser.add_argument("--data-root", type=Path, help="the folder of the data sets, for --full")
    parser.add_argument("--data", nargs="+", help="instead of all data sets")
    parser.add_argument("--nets", nargs="+", help="instead of all nets")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0, with --full 0 and 1")
    parser.add_argument("--classes", nargs="+", type=int, help="to forget; default 0 3 5 8")
    parser.add_argument("--epochs", type=int, default=8, help="of training; default 8")
    parser.add_argument("--save", type=Path, metavar="STEM", help="write STEM.md and STEM.json")
    args = parser.parse_args(argv)
    data_sets = args.data or (["cifar10", "mnist", "fashion-mnist"] if args.full else ["digits"])
    nets = args.nets or (["resnet20", "convnet"] if args.full else ["convnet"])
    seeds = args.seeds or ([0, 1] if args.full else [0])
    classes = args.classes or [0, 3, 5, 8]
    recipe = TrainRecipe(
        epochs=args.epochs,
        schedule="onecycle",
        precision="bfloat16",
        channels_last=True,
    )
    settings = {"epochs": args.epochs, "recipe": recipe.to_dict(), "classes": classes}
    document: dict[str, Any] = {
        "environment": doctor.environment(),
        "settings": settings,
        "rows": [],
    }
    if args.save:
        document["rows"] = _load(args.save.with_suffix(".json"), settings)
    for data, net, seed in product(data_sets, nets, seeds):
        if any((r["data"], r["net"], r["seed"]) == (data, net, seed) for r in document["rows"]):
            continue
        rows = []
        for row in rows_of_net(load_dataset(data, args.data_root), net, seed, classes, recipe):
            print(f"{data} {net} seed {seed} class {row.forget_class}: {_line(row)}", flush=True)
            rows.append(asdict(row))
        document["rows"] += rows
        if args.save:
            _save(args.save, document)
    print(page(document))
    return 0


def _line(row: Row) -> str:
    def pair(point: Point) -> str:
        return f"{100 * point.test_forget:.1f}/{100 * point.test_remain:.1f}"

    return (
        f"test forget/remain {pair(row.original)}; w=1 {pair(row.authors)}; paper "
        f"{pair(row.paper)}; searched {pair(row.chosen)} (w={row.chosen.remain_weight:.3g}, "
        f"R={row.chosen.ratio:g}, {row.chosen.unit}, {row.chosen.scope}); {row.masks} masks in "
        f"{row.search_seconds:.0f} s, Fisher {row.fisher_seconds:.0f} s, "
        f"training {row.train_seconds:.0f} s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
