"""Run directories: config, metrics and weights on disk, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .files import replacing

CONFIG = "config.json"
METRICS = "metrics.json"
WEIGHTS = "model.safetensors"
REPORT = "report.html"


@contextmanager
def new_run(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to write a run into; it becomes ``out`` only when the block ends well.

    The folder is a hidden sibling of ``out``, on the same file system, so that the last step is a
    rename. A run already at ``out`` is replaced after the new one is complete, and not before.

    Args:
        out: the run directory to be.
        overwrite: replace the run directory that is there.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is false, or it is no run directory: this
            function deletes nothing that fastfisher did not write.
        OSError: the folder could not be moved to ``out``; the message says where it was left.
    """
    out = Path(os.path.abspath(out))
    _check_replaceable(out, overwrite)
    mark = f"{out.name}.{uuid.uuid4().hex[:8]}"
    partial, previous = out.with_name(f".{mark}.partial"), out.with_name(f".{mark}.previous")
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        _check_replaceable(out, overwrite)
        if out.exists():
            out.rename(previous)
        try:
            partial.rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
    except OSError as error:
        # What took the time is done: leave it to the user rather than delete it.
        raise OSError(f"{error}; the finished run is in {partial}") from error
    shutil.rmtree(previous, ignore_errors=True)


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out} exists: choose another --out, or give --overwrite")
    if not _is_run(out):
        raise FileExistsError(f"{out} is no run directory of fastfisher: it is not overwritten")


def _is_run(folder: Path) -> bool:
    try:
        read_config(folder)
    except (OSError, ValueError):
        return False
    return True


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as JSON, complete or not at all; see :func:`to_json` for what it may hold."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(value) + "\n", encoding="utf-8")


def to_json(value: object) -> str:
    """``value`` as a JSON document; NaN and infinities, which JSON lacks, become null.

    Args:
        value: mappings, sequences, strings, numbers, booleans, ``None`` and paths, nested.

    Raises:
        TypeError: it holds something else.
    """
    return json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def read_config(run: Path) -> dict[str, Any]:
    """The configuration that a command left in a run directory.

    Raises:
        FileNotFoundError: there is no run directory at ``run``.
        ValueError: its config.json is not one that fastfisher wrote.
    """
    path = run / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no run directory at {run}: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "fastfisher" not in config:
        raise ValueError(f"{path} was not written by fastfisher")
    return config


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's parameters and buffers as safetensors, tied ones once."""
    from safetensors.torch import save_model

    with replacing(path) as temporary:
        save_model(model, str(temporary))


def load_weights(model: nn.Module, path: Path) -> None:
    """Read parameters and buffers that :func:`save_weights` wrote into ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no safetensors file, or holds the weights of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        load_model(model, path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} holds the weights of another model: {reason}") from error
