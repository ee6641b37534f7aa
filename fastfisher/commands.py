"""What each command of the command line does."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset

from . import __version__, models
from . import doctor as diagnosis
from .data import DataBundle, batches, load_dataset, load_object, size_of, split_forget, targets_of
from .experiments.engine import Setting
from .experiments.recipe import load_recipe, recipe_names
from .experiments.reproduce import reproduce as run_recipe
from .fisher_diag import FisherDiag, fisher_diag
from .masking import Scope
from .runs import (
    CONFIG,
    METRICS,
    REPORT,
    WEIGHTS,
    load_weights,
    new_run,
    read_config,
    save_weights,
    write_json,
)
from .unlearning import EpochRecord, EpochStats, TrainRecipe, UnlearnResult, accuracy, methods
from .unlearning import train as train_model
from .unlearning import unlearn as unlearn_model
from .unlearning.metrics import device_of, evaluating
from .unlearning.report import ACCURACIES, accuracy_table, stages, training_page, unlearning_page
from .verify import ParameterCheck, verify

EVALUATION_BATCH = 128
DEMO_OUT = Path("runs/demo")
# The settings of a demonstration, chosen by its results on 4 seeds and good on 12 others; only
# `--remain-weight auto` keeps test data out of the choice. A smaller ratio forgets as completely,
# but lets some of the class come back while fine-tuning.
DEMO_RECIPE = TrainRecipe(epochs=12, batch_size=64, lr=0.05, weight_decay=5e-4)
DEMO_RATIO, DEMO_WEIGHT = 0.05, 2.0


class UsageError(Exception):
    """The command line asks for something that cannot be."""


@dataclass(frozen=True)
class Outcome:
    """What ``--json`` prints, and whether the command found all to be good."""

    document: Mapping[str, Any]
    good: bool = True


@dataclass(frozen=True)
class Source:
    """A model and its data, as a run directory or the command line describes them.

    Attributes:
        config: "data" and "model", and for a run "recipe", as in config.json.
        bundle: the data.
        weights: file of the trained weights.
        folder: the run directory, if there is one.
    """

    config: Mapping[str, Any]
    bundle: DataBundle
    weights: Path
    folder: Path | None = None

    def trained(self) -> nn.Module:
        """The model with its weights, in eval mode."""
        model = _build(self.config["model"], self.bundle)
        load_weights(model, self.weights)
        return model.eval()


@dataclass(frozen=True)
class Split:
    """The forget and the remain set; test data are split where a class is forgotten."""

    forget: Dataset[Any]
    remain: Dataset[Any]
    test_forget: Dataset[Any] | None
    test_remain: Dataset[Any]
    words: str


def demo(args: argparse.Namespace) -> Outcome:
    """Train on the digits, mask, fine-tune, retrain; print and report the four models."""
    start = time.perf_counter()
    if args.threads is None:
        torch.set_num_threads(1)  # 8 x 8 images give a second thread nothing to do but wait
    out = args.out or DEMO_OUT
    overwrite = args.overwrite or (args.out is None and _command_of(out) == "demo")
    data = {"dataset": "digits"}
    bundle = _bundle(data)
    split = _split(bundle, args.forget_class, None)
    recipe = dataclasses.replace(DEMO_RECIPE, seed=args.seed)
    config = _config(args, "demo", data=data, model="convnet", recipe=recipe.to_dict())
    with new_run(out, overwrite=overwrite) as folder:
        original = folder / "original"
        original.mkdir()
        _train_into(original, {**config, "kind": "train"}, bundle, recipe)
        print()
        results = _unlearn_into(
            folder,
            config,
            Source(config, bundle, original / WEIGHTS),
            split,
            ["fisher-mask", "retrain"],
            recipe=recipe,
            ratio=DEMO_RATIO,
            remain_weight=DEMO_WEIGHT,
            seed=args.seed,
        )
    print()
    _print_accuracies(results)
    print(f"\n{time.perf_counter() - start:.0f} s; report: {out / REPORT}")
    return Outcome(_unlearning_document(out, results))


def train(args: argparse.Namespace) -> Outcome:
    """Train a model and write its run directory."""
    recipe = _recipe(TrainRecipe().to_dict(), args, args.epochs)
    data = _data_config(args)
    config = _config(args, "train", data=data, model=args.model, recipe=recipe.to_dict())
    with new_run(args.out, overwrite=args.overwrite) as folder:
        bundle = _bundle(data, download=args.download)
        metrics = _train_into(folder, config, bundle, recipe)
    print(f"test accuracy {_percent(metrics['test'])}; run: {args.out}")
    return Outcome({"run": args.out, **metrics})


def score(args: argparse.Namespace) -> Outcome:
    """Compute both Fishers of a trained model, save them, and sum them up per parameter."""
    source = _source(args)
    out = _out_in_run(args, source, "score")
    split = _split(source.bundle, args.forget_class, args.forget_indices)
    model = source.trained()
    config = _config(args, "score", **_described(source), forget=split.words)
    with new_run(out, overwrite=args.overwrite) as folder:
        fishers: dict[str, FisherDiag] = {}
        for part, dataset in (("forget", split.forget), ("remain", split.remain)):
            fishers[part] = fisher_diag(
                model, batches(dataset, args.batch_size), progress=_on_terminal()
            )
            fishers[part].save(folder / f"{part}.safetensors")
        summary = _fisher_summary(fishers)
        write_json(folder / METRICS, summary)
        write_json(folder / CONFIG, config)
    heads = ["parameter", "rule", "scalars"]
    for part in fishers:
        heads += [f"{part} sum", "max", "share"]
    rows = [
        [name, row["rule"], f"{row['scalars']:,}"]
        + [
            text
            for part in fishers
            for text in (
                f"{row[part]['sum']:.3e}",
                f"{row[part]['max']:.3e}",
                _percent(row[part]["share"]),
            )
        ]
        for name, row in summary["parameters"].items()
    ]
    _print_table(heads, rows, left=2)
    print(f"\nforget.safetensors and remain.safetensors are in {out}")
    return Outcome({"run": out, **summary})


def unlearn(args: argparse.Namespace) -> Outcome:
    """Run one or more methods on a trained model and report how they compare."""
    source = _source(args)
    out = _out_in_run(args, source, "unlearn")
    split = _split(source.bundle, args.forget_class, args.forget_indices)
    scope = _scope(args.scope)
    own_options = _own_options(args.option, args.method)
    recipe = _recipe(
        source.config.get("recipe") or TrainRecipe().to_dict(), args, args.train_epochs
    )
    config = _config(
        args, "unlearn", **_described(source), recipe=recipe.to_dict(), forget=split.words
    )
    with new_run(out, overwrite=args.overwrite) as folder:
        results = _unlearn_into(
            folder,
            config,
            source,
            split,
            args.method,
            own_options=own_options,
            recipe=recipe,
            ratio=args.ratio,
            remain_weight=args.remain_weight,
            granularity=args.granularity,
            exclude=args.exclude,
            scope=scope,
            epochs=args.epochs,
            replay_epochs=args.replay_epochs,
            batch_size=args.score_batch_size,
            seed=recipe.seed,
        )
    print()
    _print_accuracies(results)
    print(f"\nreport: {out / REPORT}")
    return Outcome(_unlearning_document(out, results))


def evaluate(args: argparse.Namespace) -> Outcome:
    """Test accuracy of a model: in all, per class, and of forget and remain set."""
    source = _source(args)
    correct, total = _per_class(
        source.trained(), source.bundle.test, source.bundle.num_classes, args.batch_size
    )
    right, samples = sum(correct), sum(total)
    classes: list[dict[str, Any]] = [
        {"label": label, "name": name, "samples": n, "accuracy": c / n if n else None}
        for label, (name, c, n) in enumerate(
            zip(source.bundle.class_names, correct, total, strict=True)
        )
    ]
    document: dict[str, Any] = {"accuracy": right / samples, "samples": samples, "classes": classes}
    label = args.forget_class
    if label is not None:
        if label >= len(total) or total[label] in (0, samples):
            raise ValueError(
                f"--forget-class: the test data have no sample of class {label}, or of no other"
            )
        document["forget"] = correct[label] / total[label]
        document["remain"] = (right - correct[label]) / (samples - total[label])
    print(f"test accuracy {_percent(document['accuracy'])} on {samples:,} samples\n")
    rows = [
        [str(c["label"]), c["name"], f"{c['samples']:,}", _percent(c["accuracy"])] for c in classes
    ]
    _print_table(["class", "name", "samples", "accuracy"], rows, left=2)
    if label is not None:
        forget, remain = _percent(document["forget"]), _percent(document["remain"])
        print(f"\nforget (class {label}) {forget}, remain {remain}")
    return Outcome(document)


def reproduce(args: argparse.Namespace) -> Outcome:
    """Run a recipe, whatever of it is not done, and write its report."""
    if args.recipe is None:
        names = recipe_names()
        print("\n".join(names))
        return Outcome({"recipes": names})
    try:
        recipe = load_recipe(args.recipe, args.budget)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        on_cpu = torch.empty(0, device=device).is_cpu
    except RuntimeError as error:
        raise UsageError(f"--device {device}: {error}") from error
    # One thread a task: two tasks of one thread get more done than one task of two.
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if on_cpu else 1)
    out = args.out or Path("runs/reproduce") / f"{recipe.name}-{recipe.budget}"
    setting = Setting(out, args.data_root, device, args.download, args.threads or 1)
    start = time.perf_counter()
    summary = run_recipe(recipe, setting, jobs=jobs, command=args.command_line, say=_say)
    print(f"\n{time.perf_counter() - start:.0f} s; report: {out / REPORT}")
    return Outcome(summary)


def doctor(args: argparse.Namespace) -> Outcome:
    """Tell what is installed, what is missing, and how to fix that."""
    findings = []
    marks = {"ok": "ok", "missing": "--", "broken": "!!"}
    for check in diagnosis.checks():
        findings.append(check)
        print(f"{marks[check.state]}  {check.name:<13} {check.found}", flush=True)
        if check.fix:
            print(f"{'':<18}to fix: {check.fix}")
    good = diagnosis.usable(findings)
    print("\nfastfisher is usable" if good else "\nfastfisher is not usable as it is")
    document = {"usable": good, "checks": [vars(check) for check in findings]}
    if args.model is None:
        return Outcome(document, good)
    checks = _verify(args)
    exact = all(check.exact for check in checks)
    return Outcome({**document, "parameters": [vars(c) for c in checks]}, good and exact)


def _verify(args: argparse.Namespace) -> list[ParameterCheck]:
    """Check a fresh model's Fisher on a few training samples, and print it."""
    if args.dataset is None and args.data is None:
        raise UsageError("--model: expected with --dataset or --data")
    bundle = _bundle(_data_config(args))
    inputs, targets = next(iter(batches(bundle.train, args.samples)))
    checks = verify(_build(args.model, bundle), (inputs, targets))
    wrong = [check for check in checks if not check.exact]
    print(f"\n{args.model} on {len(targets)} samples of {bundle.name}, in float64")
    rows = [[c.name, c.rule, f"{c.error:.1e}", "" if c.exact else "WRONG"] for c in checks]
    _print_table(["parameter", "computed by", "error", ""], rows, left=2)
    names = ", ".join(check.name for check in wrong)
    print(f"\nwrong: {names}" if wrong else f"\nall {len(checks)} parameters are exact")
    return checks


def _train_into(
    folder: Path, config: Mapping[str, Any], bundle: DataBundle, recipe: TrainRecipe
) -> dict[str, Any]:
    """Train a fresh model and write a run directory's files; the metrics come back."""
    torch.manual_seed(recipe.seed)
    model = _build(config["model"], bundle)
    test = batches(bundle.test, EVALUATION_BATCH)
    history: list[dict[str, Any]] = []

    def on_epoch(stats: EpochStats) -> None:
        history.append({**vars(stats), "test": accuracy(model, test)})
        _say(
            f"epoch {stats.epoch:>3}/{recipe.epochs}  loss {stats.loss:.4f}  lr {stats.lr:.2g}  "
            f"test {_percent(history[-1]['test'])}  {stats.seconds:.1f} s"
        )

    train_model(model, bundle.train, recipe, on_epoch=on_epoch, progress=_on_terminal())
    metrics = {
        "test": history[-1]["test"],
        "train": accuracy(model, batches(bundle.train, EVALUATION_BATCH)),
        "history": history,
    }
    page = training_page(
        history,
        title=f"Training: {config['model']} on {bundle.name}",
        subtitle=f"{size_of(bundle.train):,} training samples, {size_of(bundle.test):,} test "
        f"samples, {bundle.num_classes} classes",
        config=_facts(config),
        environment=config["environment"],
    )
    save_weights(model, folder / WEIGHTS)
    (folder / REPORT).write_text(page, encoding="utf-8")
    write_json(folder / METRICS, metrics)
    write_json(folder / CONFIG, config)
    return metrics


def _unlearn_into(
    folder: Path,
    config: Mapping[str, Any],
    source: Source,
    split: Split,
    methods: Sequence[str],
    *,
    recipe: TrainRecipe,
    seed: int,
    **options: Any,
) -> list[UnlearnResult]:
    """Run each method on a copy of the trained model.

    ``folder`` becomes the run directory of the first method and of the report on all of them; each
    further method gets a run directory of its own inside.
    """
    trained = source.trained()
    results = []
    own_options = options.pop("own_options", {})
    for method in methods:

        def on_epoch(record: EpochRecord, method: str = method) -> None:
            _say(_record_line(method, record))

        result = unlearn_model(
            copy.deepcopy(trained),
            split.forget,
            split.remain,
            method=method,
            options=own_options.get(method),
            recipe=recipe,
            seed=seed,
            test_forget=split.test_forget,
            test_remain=split.test_remain,
            model_factory=lambda: _build(source.config["model"], source.bundle),
            progress=_on_terminal(),
            on_epoch=on_epoch,
            **options,
        )
        results.append(result)
        own = folder if len(results) == 1 else folder / method
        result.save(own)
        if own != folder:
            write_json(own / METRICS, _method_metrics(result))
            write_json(own / CONFIG, {**config, "method": method})
    page = unlearning_page(
        results,
        title=f"Unlearning {split.words}",
        subtitle=f"{config['model']} on {source.bundle.name}: {size_of(split.forget):,} training "
        f"samples to forget, {size_of(split.remain):,} to remain",
        config=_facts(config)
        | {
            # Of all methods alike; "method" and "recipe" are shown already.
            "unlearning": {
                key: value
                for key, value in results[0].config.items()
                if key not in ("method", "options", "recipe")
            },
            "options": {result.method: result.config["options"] for result in results},
        },
        environment=config["environment"],
    )
    (folder / REPORT).write_text(page, encoding="utf-8")
    write_json(folder / METRICS, {"methods": [_method_metrics(result) for result in results]})
    write_json(folder / CONFIG, {**config, "method": methods[0]})
    return results


def _source(args: argparse.Namespace) -> Source:
    """The trained model that ``--run``, or ``--model`` with its companions, names."""
    if args.run is not None:
        if args.model or args.weights or args.dataset or args.data:
            raise UsageError("--run brings its own model, weights and data")
        config = read_config(args.run)
        if "model" not in config or "data" not in config:
            raise ValueError(f"{args.run} is the run of a command that leaves no model")
        data = dict(config["data"])
        if args.data_root is not None:
            data["data_root"] = str(args.data_root.absolute())
        if args.image_size is not None:
            data["image_size"] = args.image_size
        return Source({**config, "data": data}, _bundle(data), args.run / WEIGHTS, args.run)
    if not (args.model and args.weights and (args.dataset or args.data)):
        raise UsageError("give --run, or --model with --weights and --dataset or --data")
    data = _data_config(args)
    return Source({"model": args.model, "data": data}, _bundle(data), args.weights)


def _described(source: Source) -> dict[str, Any]:
    """What a run on a source repeats of it, so that it can be used like the source itself."""
    origin = source.folder or source.weights
    return {
        "source": str(origin.absolute()),
        "data": source.config["data"],
        "model": source.config["model"],
    }


def _out_in_run(args: argparse.Namespace, source: Source, name: str) -> Path:
    if args.out is not None:
        return Path(args.out)
    if source.folder is None:
        raise UsageError("without --run, --out is required")
    return source.folder / name


def _command_of(run: Path) -> str | None:
    """Which command wrote a run directory; ``None`` where there is none."""
    try:
        return read_config(run).get("kind")
    except (OSError, ValueError):
        return None


def _config(args: argparse.Namespace, kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "fastfisher": __version__,
        "kind": kind,
        "command": args.command_line,
        **fields,
        "environment": diagnosis.environment(),
    }


def _own_options(
    given: Sequence[tuple[str, str, Any]], chosen: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by method, checked."""
    by_method: dict[str, dict[str, Any]] = {}
    for method, name, value in given:
        if method not in chosen:
            raise UsageError(f"--option {method}.{name}: {method!r} is not among --method")
        by_method.setdefault(method, {})[name] = value
    for method, values in by_method.items():
        try:
            methods()[method].options(values)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--option {method}: {error}") from error
    return by_method


def _data_config(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset": args.dataset,
        "data": args.data,
        "data_root": None if args.data_root is None else str(args.data_root.absolute()),
        "image_size": args.image_size,
    }


def _recipe(base: Mapping[str, Any], args: argparse.Namespace, epochs: int | None) -> TrainRecipe:
    """``base`` with what the command line says instead."""
    given = {
        name: value
        for name in (
            "batch_size",
            "lr",
            "momentum",
            "weight_decay",
            "warmup_epochs",
            "augment",
            "channels_last",
            "seed",
        )
        if (value := getattr(args, name)) is not None
    }
    values = {**base, **(args.schedule or {}), **given}
    if epochs is not None and epochs != values["epochs"]:
        values["epochs"] = epochs
        if args.schedule is None:
            del values["milestones"]  # back to the defaults for this number of epochs
    try:
        return TrainRecipe.from_dict(values)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _bundle(data: Mapping[str, Any], *, download: bool = False) -> DataBundle:
    """The data that the "data" of a configuration describes."""
    path = data.get("data")
    if path is None:
        return load_dataset(
            data["dataset"],
            data.get("data_root"),
            download=download,
            image_size=data.get("image_size"),
        )
    value = load_object(path)()
    fields = tuple(DataBundle.__dataclass_fields__)
    if all(hasattr(value, field) for field in fields):
        return DataBundle(*(getattr(value, field) for field in fields))
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(
            f"--data {path}: expected (train, test) or an object with {', '.join(fields)}, "
            f"got {type(value).__name__}"
        )
    train, test = value
    shape = train[0][0].shape
    classes = int(targets_of(train).max()) + 1
    return DataBundle(
        train=train,
        test=test,
        num_classes=classes,
        in_channels=shape[0] if len(shape) == 3 else 0,
        image_size=shape[-1] if len(shape) == 3 else 0,
        class_names=tuple(str(label) for label in range(classes)),
        name=path,
    )


def _build(name: str, bundle: DataBundle) -> nn.Module:
    """A freshly initialised model: one of fastfisher's, or the user's by import path."""
    if ":" not in name:
        if not bundle.image_size:
            raise ValueError(f"--model {name} needs images [C, H, W]; {bundle.name} has none")
        return models.build(
            name,
            num_classes=bundle.num_classes,
            in_channels=bundle.in_channels,
            image_size=bundle.image_size,
        )
    model = load_object(name)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _scope(name: str) -> Scope:
    """A scope of masking: one of fastfisher's, or the user's by import path."""
    if ":" not in name:
        return cast("Scope", name)
    scope = load_object(name)
    if not callable(scope):
        raise TypeError(f"--scope {name}: expected a callable, got {type(scope).__name__}")
    return cast("Scope", scope)


def _split(bundle: DataBundle, label: int | None, indices: Path | None) -> Split:
    if indices is None:
        forget, remain = split_forget(bundle.train, forget_class=label)
        test_forget, test_remain = split_forget(bundle.test, forget_class=label)
        assert label is not None
        name = bundle.class_names[label]
        words = f"class {label}" if name == str(label) else f"class {label} ({name})"
        return Split(forget, remain, test_forget, test_remain, words)
    positions = _read_indices(indices)
    forget, remain = split_forget(bundle.train, indices=positions)
    return Split(forget, remain, None, bundle.test, f"{len(positions):,} training samples")


def _read_indices(path: Path) -> list[int]:
    """Integers separated by white space or commas."""
    words = path.read_text(encoding="utf-8").replace(",", " ").split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"{path}: expected positions, integers of at least 0, got {word!r}")
    if not words:
        raise ValueError(f"{path}: expected at least one position")
    return [int(word) for word in words]


def _per_class(
    model: nn.Module, dataset: Dataset[Any], classes: int, batch_size: int
) -> tuple[list[int], list[int]]:
    """For each label, how many samples the model gets right, and how many there are."""
    correct, total = torch.zeros(2, classes, dtype=torch.int64)
    device = device_of(model)
    with evaluating(model):
        for inputs, targets in batches(dataset, batch_size):
            if int(targets.max()) >= classes:
                raise ValueError(
                    f"test data: label {int(targets.max())}, where training has 0..{classes - 1}"
                )
            right = targets[model(inputs.to(device)).argmax(1).cpu() == targets]
            correct += torch.bincount(right, minlength=classes)
            total += torch.bincount(targets, minlength=classes)
    return correct.tolist(), total.tolist()


def _fisher_summary(fishers: Mapping[str, FisherDiag]) -> dict[str, Any]:
    """Sum, maximum and share of the whole for each parameter; float64, which sums millions."""
    sums = {
        part: {name: float(value.double().sum()) for name, value in fisher.items()}
        for part, fisher in fishers.items()
    }
    parameters: dict[str, dict[str, Any]] = {}
    for part, fisher in fishers.items():
        whole = sum(sums[part].values())
        for name, value in fisher.items():
            row = parameters.setdefault(
                name, {"rule": fisher.rules.get(name), "scalars": value.numel()}
            )
            row[part] = {
                "sum": sums[part][name],
                "max": float(value.max()),
                "share": sums[part][name] / whole if whole else 0.0,
            }
    samples = {part: fisher.samples for part, fisher in fishers.items()}
    return {"samples": samples, "parameters": parameters}


def _unlearning_document(out: Path, results: Sequence[UnlearnResult]) -> dict[str, Any]:
    return {
        "run": out,
        "accuracies": {
            stage.label: {key: getattr(stage.record, key) for key, _ in ACCURACIES}
            | {"seconds": stage.seconds}
            for stage in stages(results)
        },
        "methods": [_method_metrics(result) for result in results],
    }


def _method_metrics(result: UnlearnResult) -> dict[str, Any]:
    mask = result.mask
    return {
        "method": result.method,
        "history": [vars(record) for record in result.history],
        "chosen": result.chosen,
        "mask": mask and {"k": mask.k, "units": mask.units, "zeroed": mask.zeroed},
    }


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a report shows it, where other tables show the rest."""
    hidden = ("fastfisher", "kind", "environment")
    facts = {key: value for key, value in config.items() if key not in hidden}
    return facts | {"data": {key: value for key, value in config["data"].items() if value}}


def _record_line(method: str, record: EpochRecord) -> str:
    step = f"epoch {record.epoch}" if record.stage == "epoch" else record.stage
    measured = []
    for data in ("test", "train"):
        forget, remain = getattr(record, f"{data}_forget"), getattr(record, f"{data}_remain")
        parts = [("forget", forget), ("remain", remain)]
        texts = [f"{part} {_percent(value):>6}" for part, value in parts if value is not None]
        measured.append(f"{data}: {'  '.join(texts)}")
    return f"{method:<12}{step:<10}{'   '.join(measured)}   {record.seconds:.1f} s"


def _print_accuracies(results: Sequence[UnlearnResult]) -> None:
    table = accuracy_table(results)
    _print_table(table.heads, table.rows, left=1)


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Columns as wide as their widest cell, the first ``left`` of them aligned left."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _on_terminal() -> bool:
    """Whether progress bars make sense."""
    return sys.stderr.isatty()


def _say(line: str) -> None:
    """Print a line without tearing a progress bar that may be on the terminal."""
    if _on_terminal():
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
    else:
        print(line, flush=True)
