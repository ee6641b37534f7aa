"""The README's numbers are those that were measured and committed."""

from __future__ import annotations

from pathlib import Path

from benchmarks import markdown, report

ROOT = Path(__file__).parent.parent


STORED = [
    report.read_json(path) for path in sorted((ROOT / "benchmarks" / "results").glob("all-*.json"))
]


def shown_in(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in markdown.MARKS)
    return text[begin + len(markdown.MARKS[0]) : end]


def test_table_is_the_one_of_a_committed_run() -> None:
    assert shown_in(ROOT / "README.md") in [markdown.short(run) for run in STORED]


def test_tables_of_all_models_are_those_of_the_committed_runs() -> None:
    assert shown_in(ROOT / "docs" / "performance" / "models.md") == markdown.models(STORED)


def test_two_commands_and_every_link() -> None:
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target
