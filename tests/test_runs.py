"""A run directory is there whole or not at all, and nothing else is deleted for it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fastfisher import runs


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_run(out: Path, **extra: object) -> None:
    out.mkdir(parents=True)
    runs.write_json(out / runs.CONFIG, {"fastfisher": "0", **extra})


def test_a_run_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with runs.new_run(out) as folder:
        assert folder.parent == out.parent
        (folder / "x").write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"a/b/x": b"1"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_run_that_fails(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), runs.new_run(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_refused_before_any_work(tmp_path: Path) -> None:
    make_run(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="--overwrite"), runs.new_run(tmp_path / "out"):
        pytest.fail("the work was begun")
    assert tree(tmp_path) == before


def test_overwrite_replaces_after_success_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_run(out, old=True)
    before = tree(tmp_path)
    with pytest.raises(ValueError), runs.new_run(out, overwrite=True) as folder:
        (folder / "new").write_text("1")
        raise ValueError
    assert tree(tmp_path) == before
    with runs.new_run(out, overwrite=True) as folder:
        (folder / "new").write_text("1")
        assert tree(out) == {"config.json": before["out/config.json"]}
    assert tree(tmp_path) == {"out/new": b"1"}


def test_overwrite_deletes_only_runs(tmp_path: Path) -> None:
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"owner": "somebody"}')
    file = tmp_path / "file"
    file.write_text("text")
    before = tree(tmp_path)
    for out in (foreign, file):
        with (
            pytest.raises(FileExistsError, match="no run directory"),
            runs.new_run(out, overwrite=True),
        ):
            pytest.fail("the work was begun")
    assert tree(tmp_path) == before


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with runs.new_run(out) as folder:
        (folder / "x").write_text("1")
    assert tree(tmp_path) == {"out/x": b"1"}


def test_a_finished_run_that_cannot_be_moved_is_kept_and_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OSError, match="the finished run is in ") as caught,
        runs.new_run(out) as folder,
    ):
        (folder / "x").write_text("1")
        make_run(out)  # somebody else was faster
    kept = Path(str(caught.value).rpartition(" is in ")[2])
    assert tree(kept) == {"x": b"1"}
    assert runs.read_config(out)["fastfisher"] == "0"


def test_the_old_run_comes_back_if_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make_run(out, old=True)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"), runs.new_run(out, overwrite=True):
        pass
    assert runs.read_config(out)["old"] is True


def test_json_is_strict_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    runs.write_json(path, {"x": (math.nan, math.inf, 1.5), 3: tmp_path, "é": None})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "x": [None, None, 1.5],
        "3": str(tmp_path),
        "é": None,
    }
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        runs.write_json(path, {"x": object()})
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "not written by"), ('{"a": 1}', "not written by")],
)
def test_a_config_of_another_program_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / runs.CONFIG).write_text(content)
    with pytest.raises(ValueError, match=message):
        runs.read_config(tmp_path)


def test_a_folder_without_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        runs.read_config(tmp_path)


class Tied(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(width)
        self.conv = nn.Conv2d(width, 2, 3)


def test_weights_round_trip_with_buffers_and_ties(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    model.norm.running_mean.uniform_()
    model.to(memory_format=torch.channels_last)
    assert not model.conv.weight.is_contiguous()
    runs.save_weights(model, tmp_path / "w")
    runs.load_weights(other, tmp_path / "w")
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.b.weight is other.a.weight


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    runs.save_weights(Tied(), tmp_path / "w")
    with pytest.raises(ValueError, match="another model"):
        runs.load_weights(Tied(4), tmp_path / "w")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        runs.load_weights(Tied(), tmp_path / "absent")
    (tmp_path / "junk").write_bytes(os.urandom(100))
    with pytest.raises(ValueError, match="not a safetensors file"):
        runs.load_weights(Tied(), tmp_path / "junk")
