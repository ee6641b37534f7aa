"""Runs tasks, several at a time, each at most once: what is on disk is not computed again.

A task is done when its folder has a ``result.json``, which is written last and in one step. So a
run that is killed at any moment goes on from there when it is started again, with the same numbers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runs import write_json
from .plan import Task

RESULT = "result.json"


@dataclass(frozen=True)
class Setting:
    """Where tasks run; no part of what they are.

    Attributes:
        folder: of the results.
        data_root: folder of the data sets.
        device: "cpu", "cuda", "cuda:1" ...
        download: fetch a missing data set.
        threads: CPU threads of a task.
    """

    folder: Path
    data_root: Path | None = None
    device: str = "cpu"
    download: bool = False
    threads: int = 1

    def of(self, task: Task) -> Path:
        """The folder of a task's results."""
        name = re.sub(r"[^0-9A-Za-z.]+", "-", task.name).strip("-").lower()
        return self.folder / "tasks" / f"{name}.{task.key}"

    def result(self, task: Task) -> dict[str, Any]:
        """What a task that is done has found.

        Raises:
            FileNotFoundError: it is not done.
        """
        found = json.loads((self.of(task) / RESULT).read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found

    def done(self, task: Task) -> bool:
        """Whether the task has its result."""
        return (self.of(task) / RESULT).is_file()


Runner = Callable[[Task, Setting], dict[str, Any]]


def run_all(
    tasks: Sequence[Task],
    runner: Runner,
    setting: Setting,
    *,
    jobs: int = 1,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Run what is not done yet.

    Args:
        tasks: each after those that it needs.
        runner: does a task; a function of a module, so that other processes find it.
        setting: where.
        jobs: processes; 1 runs all in this one.
        say: called with a line when a task is done.

    Raises:
        RuntimeError: a task raised something, or a process died, as it does when memory runs out;
            starting again goes on.
    """
    open_tasks = {task.key: task for task in tasks if not setting.done(task)}
    finished = len(tasks) - len(open_tasks)
    if finished:
        say(f"{finished} of {len(tasks)} tasks are done already")

    def tell(task: Task, seconds: float) -> None:
        nonlocal finished
        finished += 1
        say(f"[{finished:>{len(str(len(tasks)))}}/{len(tasks)}] {task.name}  {seconds:.1f} s")

    if jobs == 1:
        _begin(setting.threads, None)
        for task in open_tasks.values():
            tell(task, _do(task, runner, setting))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        jobs, context, initializer=_begin, initargs=(setting.threads, os.getpid())
    )
    running: dict[Future[float], Task] = {}
    try:
        while open_tasks or running:
            for key, task in list(open_tasks.items()):
                if len(running) < jobs and all(map(setting.done, task.needed())):
                    running[pool.submit(_do, task, runner, setting)] = open_tasks.pop(key)
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                task = running.pop(future)
                try:
                    tell(task, future.result())
                except BrokenProcessPool:
                    raise RuntimeError(
                        f"a process died while {task.name!r} ran, as when memory runs out; start "
                        "again to go on, perhaps with fewer --jobs"
                    ) from None
    finally:
        for process in (pool._processes or {}).values():
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _do(task: Task, runner: Runner, setting: Setting) -> float:
    """Run one task and write its result; its seconds come back."""
    folder = setting.of(task)
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        result = runner(task, setting)
    except Exception as error:
        raise RuntimeError(f"{task.name}: {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - start
    write_json(folder / RESULT, {"task": task.name, **result, "task_seconds": seconds})
    return seconds


def _begin(threads: int, parent: int | None) -> None:
    """Prepare a process; it ends with its parent, even one that was killed."""
    torch.set_num_threads(threads)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
