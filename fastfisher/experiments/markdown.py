"""A reproduction as a Markdown page, for ``docs/results``."""

from __future__ import annotations

import re

from ..unlearning.report import Section, Table, cell
from .aggregate import Summary, check_format
from .tables import accuracy_curves, headline, tables


def results_page(summary: Summary) -> str:
    """The tables and the claims of a reproduction; the same text for the same summary.

    Args:
        summary: what ``fastfisher reproduce`` wrote.

    Returns:
        The page, GitHub's Markdown.

    Raises:
        ValueError: ``summary`` is of another format.
    """
    check_format(summary)
    recipe = summary["recipe"]
    sections = list(tables(summary).items())
    if (curves := accuracy_curves(summary)) is not None:
        place = next(
            (i for i, (name, _) in enumerate(sections) if name not in ("tuned", "masked")), 0
        )
        sections.insert(place, ("curves", curves))
    parts = [f"# {_text(recipe.get('title') or recipe['name'])}"]
    if recipe.get("text"):
        parts.append(_text(str(recipe["text"]).strip()))
    parts.append(_text(headline(summary)))
    parts += [_section(section) for _, section in sections]
    facts = {
        "Recipe": f"{recipe['name']}, version {recipe.get('version', '-')}",
        "Budget": summary["budget"],
        "Data": _counts(summary),
        "fastfisher": summary["fastfisher"],
        **{key.replace("_", " "): value for key, value in summary["environment"].items()},
    }
    lines = [f"- {_text(name)}: {_text(cell(value))}" for name, value in facts.items()]
    parts.append("## How it was run\n\n" + "\n".join(lines))
    command = "\n".join(f"    {line}" for line in str(summary["command"]).splitlines())
    parts.append(command)
    return "\n\n".join(parts) + "\n"


def _counts(summary: Summary) -> str:
    data = summary["data"]
    return (
        f"{data['name']}, {data['train']:,} training and {data['test']:,} test images, "
        f"{data['forget']:,} to forget"
    )


def _section(section: Section) -> str:
    assert section.table is not None
    return f"## {_text(section.title)}\n\n{_text(section.text)}\n\n{_table(section.table)}"


def _table(table: Table) -> str:
    """Numbers to the right, words to the left."""
    left = {0} | table.prose
    rule = [":--" if i in left else "--:" for i in range(len(table.heads))]
    body = [
        [
            f"**{_text(text)}**" if (i, j) in table.marks else _text(text)
            for j, text in enumerate(row)
        ]
        for i, row in enumerate(table.rows)
    ]
    lines = [list(map(_text, table.heads)), rule, *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", text)
    return " ".join(escaped.split())
