"""``reproduce``: run a recipe, whatever of it is not done, and sum it up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__
from ..data import size_of
from ..doctor import environment
from ..runs import write_json
from ..unlearning import methods
from . import measure
from .audit import OUTPUTS
from .engine import Setting, run_all
from .plan import Plan, Row, plan
from .recipe import Recipe
from .tasks import OF_A_RUN, run_task
from .views import view_of

RECIPE, SUMMARY, REPORT, PAGE = "recipe.json", "summary.json", "report.html", "results.md"
FORMAT = "fastfisher.reproduce/1"


def reproduce(
    recipe: Recipe,
    setting: Setting,
    *,
    jobs: int = 1,
    command: str = "",
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Run a recipe, and write ``summary.json``, ``report.html`` and ``results.md``.

    Tasks that an earlier call has finished in the same folder are not run again. The numbers do
    not depend on ``jobs``, nor on how often the run was interrupted; they may on
    ``setting.threads``, the device and the versions of torch and its libraries.

    Args:
        recipe: as :func:`fastfisher.experiments.recipe.load_recipe` gives it.
        setting: where to run; its folder is made where it does not exist.
        jobs: tasks at a time, each in a process of its own.
        command: shown in the report.
        say: called with a line of progress at a time.

    Returns:
        The summary, as it is in ``summary.json``.

    Raises:
        FileExistsError: the folder is that of another recipe, or has other files.
        RuntimeError: a task failed.
        FileNotFoundError: the data set is not there.
    """
    # Here, since a page is all that they are needed for.
    from .markdown import results_page
    from .report import reproduction_page

    _claim(setting.folder, recipe)
    planned = plan(recipe)
    tasks = planned.tasks()
    view_of(tasks[0].params, setting)  # so that missing data are noticed at once
    run_all(tasks, run_task, setting, jobs=jobs, say=say)
    summary = summarise(recipe, planned, setting, command)
    write_json(setting.folder / SUMMARY, summary)
    # What is read back has been rounded and emptied as JSON demands, as for a later reader.
    summary = json.loads((setting.folder / SUMMARY).read_text(encoding="utf-8"))
    (setting.folder / REPORT).write_text(reproduction_page(summary), encoding="utf-8")
    (setting.folder / PAGE).write_text(results_page(summary), encoding="utf-8")
    return summary


def summarise(recipe: Recipe, planned: Plan, setting: Setting, command: str) -> dict[str, Any]:
    """All numbers of a recipe whose tasks are done, as JSON-able values."""
    tasks = planned.tasks()
    view = view_of(tasks[0].params, setting)
    experiments: dict[str, list[dict[str, Any]]] = {}
    for row in planned.rows:
        experiments.setdefault(row.experiment, []).append(_row(row, setting))
    references: dict[str, list[dict[str, Any]]] = {}
    for row in planned.references:
        references.setdefault(row.experiment, []).append(_reference(row, planned, setting))
    return {
        "format": FORMAT,
        "fastfisher": __version__,
        "command": command,
        "recipe": recipe.to_dict(),
        "budget": recipe.budget,
        "data": {
            "name": view.bundle.name,
            "classes": list(view.bundle.class_names),
            "train": size_of(view.bundle.train),
            "test": size_of(view.bundle.test),
            "forget": size_of(view.forget),
            "remain": size_of(view.remain),
        },
        "environment": {**environment(), "device": setting.device, "threads": setting.threads},
        "methods": [
            {
                "label": entry.label,
                "method": entry.method,
                # Also where it is the method's default.
                "definition": getattr(
                    methods()[entry.method].options(entry.options), "definition", None
                ),
                "options": entry.options,
                "masks": entry.method.endswith("-mask"),
                "control": entry.control,
                "beyond_paper": entry.beyond_paper,
            }
            for entry in recipe.methods
        ],
        "experiments": experiments,
        "references": references,
        "audits": _audits(planned, setting),
        "tasks": {
            "count": len(tasks),
            "seconds": sum(setting.result(task)["task_seconds"] for task in tasks),
        },
    }


def _row(row: Row, setting: Setting) -> dict[str, Any]:
    found = setting.result(row.task)
    names = ("failed", "history", *OF_A_RUN)
    described = {"method": row.label, "seed": row.seed, "setting": row.setting}
    return {**described, **{name: found[name] for name in names}}


def _reference(row: Row, planned: Plan, setting: Setting) -> dict[str, Any]:
    """A retrained model as a row: measured beside the other ones of its kind and data."""
    found = setting.result(row.task)
    of_kind = [
        each
        for each in planned.references
        if (each.experiment, each.setting) == (row.experiment, row.setting)
        and each.task.params["noise_seed"] == row.task.params["noise_seed"]
    ]
    outputs = {
        each.task.key: measure.load_outputs(setting.of(each.task) / OUTPUTS) for each in of_kind
    }
    others = [each for key, each in outputs.items() if key != row.task.key]
    final = measure.metrics(outputs[row.task.key], others, None)
    for relearn in planned.relearns:
        if row.task in relearn.needs["retrained"]:
            values = setting.result(relearn)
            final |= {name: values[name] for name in ("relearn_epochs", "relearn_reached")}
    return {
        "method": "Retrain",
        "failed": None,
        "seed": row.seed,
        "setting": row.setting,
        "history": found["history"],
        "original": None,
        "edited": None,
        "final": final,
        "confusion_shift": None,
        "seconds": found["seconds"],
    }


def _audits(planned: Plan, setting: Setting) -> dict[str, Any]:
    if not planned.audits:
        return {}
    found = [(row.label, setting.result(row.task)) for row in planned.audits]
    return {
        "budget": found[0][1]["budget"],
        "rows": [
            {"method": label, **attack} for label, result in found for attack in result["attacks"]
        ],
    }


def _claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's, unless it is another's."""
    mine = {"format": FORMAT, "name": recipe.name, "budget": recipe.budget}
    mark = folder / RECIPE
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != mine:
            raise FileExistsError(f"{folder} holds another recipe or budget: choose another --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and was not written by reproduce")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, mine)
