"""Reading the pretraining corpus: compressed JSON lines, one story or chapter each."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path


def read_texts(path: Path) -> Iterator[str]:
    """Yields the `text` field of each line of a `.jsonl.xz` file, in file order.

    Raises `FileNotFoundError` for a missing file and `KeyError` for a line without `text`.
    """
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            assert isinstance(text, str), f"{path}: text is not a string"
            yield text


def read_parts(corpus: Path, parts: list[str]) -> Iterator[str]:
    """Yields the texts of the named parts (such as `children-00`) one part after the other."""
    for part in parts:
        yield from read_texts(corpus / f"{part}.jsonl.xz")
