"""The documents of the repository, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: `sh`, `python` or another language, and what is in it."""

    document: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block that are no comments."""
        lines = (line.partition(" #")[0].strip() for line in self.text.splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def documents() -> list[str]:
    """Return the documents that people read, from the repository's root; decisions are left out."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "adr" not in path.parts]
    return ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in pages)]


def blocks(document: str) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    text = (ROOT / document).read_text("utf-8")
    return [Block(document, language, body) for language, body in _BLOCK.findall(text)]
