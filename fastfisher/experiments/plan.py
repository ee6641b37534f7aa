"""The tasks that a recipe comes to: what to train and to unlearn, and what needs what.

A task's key is the hash of all that its result follows from, the tasks it needs included. A result
on disk is found by that key, so that a changed recipe computes anew what the change concerns, and
nothing else. Experiments that ask for the same thing share one task.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..unlearning import TrainRecipe
from .recipe import RETRAIN, Entry, Recipe, Study

# Raised whenever the same task would give another result than before.
_FORMAT = 1
# Far from the seeds that people choose: retrained models and shadow models are further draws.
_REFERENCE_SEED, _SHADOW_SEED = 100_000, 200_000


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        name: says what it is, for people.
        kind: "train", "unlearn" or "audit": what to run.
        params: of it, JSON-able.
        needs: tasks whose results it reads, by role.
    """

    name: str
    kind: str
    params: dict[str, Any]
    needs: Mapping[str, tuple[Task, ...]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The hash of everything that the result follows from."""
        needs = {role: [task.key for task in tasks] for role, tasks in self.needs.items()}
        text = json.dumps([_FORMAT, self.kind, self.params, needs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def needed(self) -> Iterator[Task]:
        """The tasks of all roles."""
        for tasks in self.needs.values():
            yield from tasks


@dataclass(frozen=True)
class Row:
    """One line of an experiment, and the task that its numbers come from."""

    experiment: str
    label: str
    seed: int
    setting: dict[str, Any]
    task: Task


@dataclass(frozen=True)
class Plan:
    """All of a recipe.

    Attributes:
        rows: of the methods.
        references: of the retrained models.
        audits: of the attacks by shadow models, one a method.
        relearns: of the retrained models, if the relearn time is measured.
    """

    rows: list[Row]
    references: list[Row]
    audits: list[Row]
    relearns: list[Task]

    def tasks(self) -> list[Task]:
        """Every task once, each after those that it needs."""
        ordered: dict[str, Task] = {}

        def add(task: Task) -> None:
            if task.key not in ordered:
                for needed in task.needed():
                    add(needed)
                ordered[task.key] = task

        for row in [*self.references, *self.rows, *self.audits]:
            add(row.task)
        for task in self.relearns:
            add(task)
        return list(ordered.values())


def plan(recipe: Recipe) -> Plan:
    """The tasks and rows of a recipe."""
    made = _Planner(recipe)
    main = made.references()
    rows = [made.row(entry, seed) for seed in recipe.unlearn.seeds for entry in recipe.methods]
    references = [Row("remove-class", RETRAIN, task.params["seed"], {}, task) for task in main]
    for name, study in (
        ("outliers", recipe.outliers),
        ("limited", recipe.limited),
        ("ratios", recipe.ratios),
        ("schedules", recipe.schedules),
    ):
        if study is not None:
            rows += made.study(name, study)
    if recipe.outliers is not None:
        references += [
            Row("outliers", RETRAIN, seed, {"share": share}, made.reference(seed, share))
            for share in recipe.outliers.values
            for seed in recipe.unlearn.seeds
        ]
    return Plan(rows, references, made.audits(), made.relearns(main))


class _Planner:
    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def train(
        self,
        name: str,
        seed: int,
        *,
        remain_only: bool = False,
        noise: float | None = None,
        half: bool = False,
    ) -> Task:
        params = {
            **self._view(seed if noise is not None else None, noise),
            "seed": seed,
            "train": self._recipe.train.to_dict(),
            "remain_only": remain_only,
            "half": half,
        }
        return Task(name, "train", params)

    def original(self, seed: int, noise: float | None = None) -> Task:
        words = "" if noise is None else f" noise {noise:g}"
        return self.train(f"original{words} seed {seed}", seed, noise=noise)

    def reference(self, seed: int, noise: float | None = None) -> Task:
        words = "" if noise is None else f" noise {noise:g}"
        return self.train(f"retrain{words} seed {seed}", seed, remain_only=True, noise=noise)

    def references(self) -> tuple[Task, ...]:
        count = self._recipe.unlearn.references
        return tuple(self.reference(_REFERENCE_SEED + i) for i in range(count))

    def row(
        self,
        entry: Entry,
        seed: int,
        *,
        experiment: str = "remove-class",
        epochs: int | None = None,
        setting: Mapping[str, Any] | None = None,
    ) -> Row:
        """A method's run, in an experiment that changes something."""
        recipe, setting = self._recipe, dict(setting or {})
        noise = setting.get("share")
        ratio = recipe.unlearn.ratio if entry.ratio is None else entry.ratio
        train = recipe.train
        if str(setting.get("schedule", "")).startswith("constant "):
            train = _constant(train, float(setting["schedule"].split()[1]))
        wanted = recipe.unlearn.epochs if epochs is None else epochs
        params = {
            **self._view(seed if noise is not None else None, noise),
            "seed": seed,
            "method": entry.method,
            "options": entry.options,
            "ratio": setting.get("ratio", ratio),
            "remain_weight": entry.remain_weight,
            "granularity": entry.granularity,
            "scope": entry.scope,
            "exclude": list(entry.exclude),
            "epochs": wanted if entry.epochs is None else entry.epochs,
            "replay_epochs": recipe.unlearn.replay_epochs,
            "relearn_epochs": recipe.unlearn.relearn_epochs if experiment == "remove-class" else 0,
            "train": train.to_dict(),
            "remain_samples": setting.get("remain_samples"),
        }
        if params["remain_samples"] == 0:
            params["epochs"] = 0
        references = self.references() if noise is None else (self.reference(seed, noise),)
        needs = {"original": (self.original(seed, noise),), "references": references}
        words = "".join(f" {key} {value}" for key, value in setting.items())
        task = Task(f"{entry.label}{words} seed {seed}", "unlearn", params, needs)
        return Row(experiment, entry.label, seed, setting, task)

    def study(self, name: str, study: Study) -> list[Row]:
        settings: list[dict[str, Any]] = []
        for value in study.values:
            if name == "outliers":
                settings.append({"share": float(value)})
            elif name == "limited":
                settings.append({"remain_samples": int(value)})
            elif name == "ratios":
                settings.append({"ratio": float(value)})
            else:
                settings.append({"schedule": f"constant {value:g}"})
        if name == "schedules":
            settings.insert(0, {"schedule": "replay"})
        return [
            self.row(
                self._recipe.entry(label),
                seed,
                experiment=name,
                epochs=study.epochs,
                setting=setting,
            )
            for seed in self._recipe.unlearn.seeds
            for setting in settings
            for label in study.methods
        ]

    def audits(self) -> list[Row]:
        """U-LiRA's and Shokri's shadows, and the attacks on each audited method."""
        audit = self._recipe.audit
        if not audit.shadows and not audit.shokri:
            return []
        labels = audit.methods or tuple(
            entry.label for entry in self._recipe.methods if not entry.beyond_paper
        )
        seeds = [_SHADOW_SEED + i for i in range(audit.shadows)]
        retrained = tuple(self.reference(seed) for seed in seeds)
        halves = tuple(
            self.train(f"half {i}", _SHADOW_SEED + i, half=True) for i in range(audit.shokri)
        )
        rows = []
        for label in labels:
            entry = self._recipe.entry(label)
            needs = {
                "targets": tuple(self.row(entry, seed).task for seed in self._recipe.unlearn.seeds),
                "unlearned": tuple(self.row(entry, seed).task for seed in seeds),
                "retrained": retrained,
                "references": self.references(),
                "halves": halves,
            }
            task = Task(f"audit of {label}", "audit", self._view(None, None), needs)
            rows.append(Row("audits", label, 0, {}, task))
        return rows

    def relearns(self, retrained: tuple[Task, ...]) -> list[Task]:
        """The relearn time of retrained models, from the loss of the first seed's original."""
        unlearn = self._recipe.unlearn
        if not unlearn.relearn_epochs:
            return []
        seed = unlearn.seeds[0]
        params = {
            **self._view(None, None),
            "seed": seed,
            "relearn_epochs": unlearn.relearn_epochs,
        }
        original = (self.original(seed),)
        return [
            Task(
                f"relearn {task.name}",
                "relearn",
                params,
                {"original": original, "retrained": (task,)},
            )
            for task in retrained
        ]

    def _view(self, noise_seed: int | None, noise: float | None) -> dict[str, Any]:
        recipe = self._recipe
        return {
            "data": dataclasses.asdict(recipe.data),
            "model": recipe.model,
            "forget_class": recipe.unlearn.forget_class,
            "noise": noise,
            "noise_seed": noise_seed,
            "batch_size": recipe.unlearn.batch_size,
        }


def _constant(train: TrainRecipe, lr: float) -> TrainRecipe:
    return dataclasses.replace(train, lr=lr, schedule="multistep", milestones=(), warmup_epochs=0)


def studies(recipe: Recipe) -> Sequence[str]:
    """Names of the experiments that a recipe has."""
    names = ("outliers", "limited", "ratios", "schedules")
    return ["remove-class", *(name for name in names if getattr(recipe, name) is not None)]
