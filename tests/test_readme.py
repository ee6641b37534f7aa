"""The README's numbers are those that were measured and committed."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parent.parent


def test_table_is_the_one_of_a_committed_run() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in report.MARKS)
    shown = text[begin + len(report.MARKS[0]) : end]
    tables = [
        report.markdown(*report.read_json(path))
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
        if not path.stem.startswith("latest")
    ]
    assert shown in tables


def test_two_commands_and_every_link() -> None:
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
