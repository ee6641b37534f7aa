"""Recipes say everything, plans share what they can, and a run that is killed goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfisher.cli import main
from fastfisher.data import load_dataset, size_of, targets_of
from fastfisher.experiments.engine import Setting, run_all
from fastfisher.experiments.plan import Task, plan
from fastfisher.experiments.recipe import Recipe, load_recipe, recipe_names
from fastfisher.experiments.views import part_of, view_of

TINY = """
title = "a test"
version = 1
model = "convnet"

[data]
name = "digits"
train_samples = 300
test_samples = 100

[train]
epochs = 2
lr = 0.05
batch_size = 50

[unlearn]
seeds = [0, 1]
epochs = 1
ratio = 0.01
references = 2
relearn_epochs = 2

[[methods]]
label = "Finetune"
method = "finetune"

[[methods]]
label = "Fisher"
method = "fisher-mask"

[[methods]]
label = "Random"
method = "random-mask"
epochs = 0

[outliers]
values = [0.3]
methods = ["Fisher"]

[limited]
values = [0, 20]
methods = ["Fisher"]

[ratios]
values = [0.01, 0.05]
methods = ["Fisher"]

[schedules]
values = [0.01]
methods = ["Finetune"]

[audit]
shadows = 2
shokri = 1
methods = ["Fisher"]

[budget.small.changes.Fisher]
ratio = 0.02

[budget.less]
outliers = false
limited = false
schedules = false
"""


@pytest.fixture(name="recipe_file")
def _recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def tiny(path: Path, **changes: Any) -> Recipe:
    return replace(load_recipe(str(path), "full"), **changes)


@pytest.mark.parametrize("budget", ["small", "full"])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_whole(name: str, budget: str) -> None:
    recipe = load_recipe(name, budget)
    planned = plan(recipe)
    tasks = planned.tasks()
    assert recipe.name == name
    assert {row.label for row in planned.rows} == {entry.label for entry in recipe.methods}
    assert len({task.key for task in tasks}) == len(tasks)
    places = {task.key: place for place, task in enumerate(tasks)}
    for task in tasks:
        assert all(places[needed.key] < places[task.key] for needed in task.needed())


def test_the_recipes_are_the_cells_of_the_papers_grid() -> None:
    cells = {
        f"{data}-{net}"
        for data, first in (
            ("cifar10", "resnet20"),
            ("mnist", "resnet20"),
            ("cifar100", "resnet50"),
            ("tiny-imagenet", "resnet50"),
        )
        for net in (first, "vgg16", "googlenet", "densenet")
    }
    assert cells <= set(recipe_names())
    for name in cells:
        recipe = load_recipe(name, "full")
        ratio = 0.02 if recipe.data.name.startswith("cifar") else 0.04
        epochs = 30 if recipe.data.name == "mnist" else 160
        assert (recipe.unlearn.ratio, recipe.train.epochs) == (ratio, epochs)
        assert len(recipe.unlearn.seeds) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version = 1", "version = 1\nsome = 2", "unknown names \\['some'\\]"),
        ('name = "digits"', 'name = "letters"', "data.name: expected one of"),
        ('method = "finetune"', 'method = "magic"', "methods.Finetune.method: expected one of"),
        ('method = "finetune"', 'method = "retrain"', "methods.Finetune.method: expected one of"),
        ('label = "Random"', 'label = "Fisher"', "a label occurs twice"),
        ('methods = ["Finetune"]', 'methods = ["Nobody"]', "schedules.methods: expected one of"),
        ("seeds = [0, 1]", "seeds = []", "unlearn.seeds: expected different integers"),
        ("seeds = [0, 1]", "", "unlearn: \\['seeds'\\] missing"),
        ("ratio = 0.01\nref", "ratio = 2\nref", "unlearn.ratio: expected 0 to 1"),
        ("[train]", "[train]\nspeed = 3", "unknown names \\['speed'\\]"),
        ("version = 1", "version = ", "is not valid TOML"),
    ],
)
def test_a_bad_recipe_is_refused(recipe_file: Path, old: str, new: str, message: str) -> None:
    assert TINY.count(old) >= 1
    recipe_file.write_text(TINY.replace(old, new, 1))
    with pytest.raises((ValueError, TypeError), match=message):
        load_recipe(str(recipe_file), "full")


def test_budgets_change_a_recipe(recipe_file: Path) -> None:
    full, small, less = (load_recipe(str(recipe_file), name) for name in ("full", "small", "less"))
    assert (full.entry("Fisher").ratio, small.entry("Fisher").ratio) == (None, 0.02)
    assert small.entry("Random") == full.entry("Random")
    assert full.outliers is not None and less.outliers is None
    with pytest.raises(ValueError, match="budget: expected one of"):
        load_recipe(str(recipe_file), "huge")
    with pytest.raises(ValueError, match="recipe: expected the path of a TOML file or one of"):
        load_recipe("nothing")


def test_what_is_the_same_is_done_once(recipe_file: Path) -> None:
    recipe = tiny(recipe_file)
    planned = plan(recipe)
    rows = {(row.experiment, row.label, row.seed, str(row.setting)): row for row in planned.rows}
    main_run = rows["remove-class", "Fisher", 0, "{}"].task
    assert rows["ratios", "Fisher", 0, "{'ratio': 0.01}"].task.params["ratio"] == 0.01
    replayed = rows["schedules", "Finetune", 1, "{'schedule': 'replay'}"].task
    # The relearn time is measured in the first experiment alone.
    without = plan(tiny(recipe_file, unlearn=replace(recipe.unlearn, relearn_epochs=0)))
    keys = Counter(row.task.key for row in without.rows)
    assert replayed.key in keys and max(keys.values()) == 2
    assert main_run.key not in keys


def test_a_change_concerns_no_other_task(recipe_file: Path) -> None:
    before = {task.name: task.key for task in plan(tiny(recipe_file)).tasks()}
    recipe_file.write_text(TINY.replace('method = "random-mask"', 'method = "finetune"'))
    after = {task.name: task.key for task in plan(tiny(recipe_file)).tasks()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"Random seed 0", "Random seed 1"}
    recipe_file.write_text(TINY.replace("lr = 0.05", "lr = 0.1"))
    after = {task.name: task.key for task in plan(tiny(recipe_file)).tasks()}
    assert all(before[name] != after[name] for name in before)


def test_the_samples_of_a_class_and_of_outliers(recipe_file: Path, tmp_path: Path) -> None:
    params = plan(tiny(recipe_file)).tasks()[0].params
    view = view_of(params, Setting(tmp_path))
    assert (size_of(view.train), size_of(view.test_remain) + size_of(view.test_forget)) == (
        300,
        100,
    )
    assert (
        set(targets_of(view.forget).tolist()) == set(targets_of(view.test_forget).tolist()) == {0}
    )
    assert 0 not in set(targets_of(view.remain).tolist())
    noisy = view_of({**params, "noise": 0.3, "noise_seed": 1}, Setting(tmp_path))
    assert (size_of(noisy.forget), size_of(noisy.remain)) == (90, 210)
    wrong = targets_of(noisy.forget) != targets_of(noisy.test_forget)
    assert 0.75 < wrong.double().mean() < 1  # a tenth keeps its label by chance
    for (image, _), (same, _) in zip(noisy.forget, noisy.test_forget, strict=True):  # type: ignore[call-overload]
        assert torch.equal(image, same)
    clean = {tuple(image.flatten().tolist()): int(target) for image, target in view.train}  # type: ignore[attr-defined]
    for image, target in noisy.remain:  # type: ignore[attr-defined]
        assert clean[tuple(image.flatten().tolist())] == int(target)


def test_a_stratified_part_has_each_class_in_proportion() -> None:
    digits = load_dataset("digits").train
    part = part_of(digits, 100, seed=3)
    counts = targets_of(part).bincount(minlength=10)
    assert size_of(part) == 100 and counts.min() >= 9 and counts.max() <= 11
    assert part_of(digits, 10**6, seed=3) is digits


LOG = "log.txt"


def note(task: Task, setting: Setting) -> dict[str, Any]:
    """A runner that fails, dies or sleeps as it is told, and says that it ran."""
    for needed in task.needed():
        assert setting.done(needed)
    with open(setting.folder / LOG, "a") as log:
        log.write(f"{task.name} {os.getpid()}\n")
    time.sleep(task.params.get("sleep", 0))
    if task.params.get("fail"):
        raise ValueError("no such luck")
    if task.params.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": task.params["value"]}


def chain() -> list[Task]:
    first = [Task(f"first {i}", "note", {"value": i}) for i in range(3)]
    return [*first, Task("last", "note", {"value": 9}, {"all": tuple(first)})]


@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_run_once_and_in_order(tmp_path: Path, jobs: int) -> None:
    setting, lines = Setting(tmp_path), []  # type: ignore[var-annotated]
    run_all(chain(), note, setting, jobs=jobs, say=lines.append)
    assert [setting.result(task)["value"] for task in chain()] == [0, 1, 2, 9]
    assert len(lines) == 4 and lines[-1].startswith("[4/4] last")
    run_all(chain(), note, setting, jobs=jobs, say=lines.append)
    assert lines[4:] == ["4 of 4 tasks are done already"]
    assert len((tmp_path / LOG).read_text().splitlines()) == 4


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_task_raises_is_told_with_its_name(tmp_path: Path, jobs: int) -> None:
    tasks = [*chain(), Task("bad", "note", {"value": 0, "fail": True})]
    with pytest.raises(RuntimeError, match="bad: ValueError: no such luck"):
        run_all(tasks, note, Setting(tmp_path), jobs=jobs)
    assert not Setting(tmp_path).done(tasks[-1])


def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    tasks = [Task("deadly", "note", {"value": 0, "die": True})]
    with pytest.raises(RuntimeError, match="a process died while 'deadly' ran"):
        run_all(tasks, note, Setting(tmp_path), jobs=2)


def reproduce(recipe: Path, out: Path, jobs: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastfisher", "reproduce", str(recipe), "--budget", "full"]
    return subprocess.Popen(
        [*command, "--jobs", str(jobs), "--out", str(out)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def numbers(value: Any) -> Any:
    """A summary without what tells when and how fast it came about."""
    if isinstance(value, dict):
        hidden = ("seconds", "environment", "command", "tasks")
        return {key: numbers(each) for key, each in value.items() if key not in hidden}
    return [numbers(each) for each in value] if isinstance(value, list) else value


def test_a_killed_run_goes_on_to_the_same_numbers(recipe_file: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = reproduce(recipe_file, whole, 1)
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output
    # FASTFISHER_KILLS=20 is the test at full length.
    kills, moments = int(os.environ.get("FASTFISHER_KILLS", "3")), random.Random(0)
    for _ in range(kills):
        process = reproduce(recipe_file, killed, 2)
        time.sleep(moments.uniform(0, 15))
        process.kill()
        process.communicate()
    final = reproduce(recipe_file, killed, 2)
    output, _ = final.communicate(timeout=300)
    assert final.returncode == 0, output
    summaries = [json.loads((out / "summary.json").read_text()) for out in (whole, killed)]
    assert numbers(summaries[0]) == numbers(summaries[1])
    experiments = summaries[0]["experiments"]
    assert {name: len(rows) for name, rows in experiments.items()} == {
        "remove-class": 6, "outliers": 2, "limited": 4, "ratios": 4, "schedules": 4,
    }  # fmt: skip
    assert len(summaries[0]["audits"]["rows"]) == 2
    assert all((whole / name).is_file() for name in ("report.html", "results.md"))


def test_a_folder_is_one_recipes(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    assert main(["reproduce", str(recipe_file), "--budget", "full", "--out", str(full)]) == 1
    assert "was not written by reproduce" in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_the_command_line_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(["reproduce", "nothing"]) == 2
    assert "expected the path of a TOML file or one of" in capsys.readouterr().err
    assert main(["reproduce", "digits-smallcnn", "--budget", "huge"]) == 2
    assert main(["reproduce", "digits-smallcnn", "--device", "abacus"]) == 2
    assert "--device abacus" in capsys.readouterr().err
