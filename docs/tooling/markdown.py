"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, with an empty one after them; the first column is set as code."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| `{row[0]}` | {' | '.join(cell(text) for text in row[1:])} |"
    yield ""


def cell(text: str) -> str:
    """Return text that stays within one cell of a table; what is set as code in it stays as it is."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [part.replace("|", "&#124;").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def anchor(heading: str) -> str:
    """Return the anchor that the site gives a heading of letters, digits, dots, `_` and `-`."""
    return "".join(character for character in heading.lower() if character.isalnum() or character in "_-")
