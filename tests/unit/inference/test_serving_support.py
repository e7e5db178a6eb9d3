"""docs/serving-support.md says what the parity tests hold."""

from __future__ import annotations

import re
from pathlib import Path

from services.common.adapter_format import AdapterKind
from tests.support.architectures import ARCHITECTURES

PAGE = (Path(__file__).parents[3] / "docs" / "serving-support.md").read_text(encoding="utf-8")


def first_column(heading: str) -> list[str]:
    """Return the first cells of the first table under a heading."""
    section = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert table is not None
    rows = [line.split("|")[1].strip() for line in table.group().splitlines()]
    return [cell.strip("`") for cell in rows[2:]]


def test_the_architectures_are_those_of_the_parity_tests() -> None:
    tested = list(dict.fromkeys(architecture.model_type for architecture in ARCHITECTURES.values()))
    assert first_column("Architectures") == tested


def test_the_kinds_are_those_of_the_format() -> None:
    assert first_column("Adapters") == [kind.value for kind in AdapterKind]
