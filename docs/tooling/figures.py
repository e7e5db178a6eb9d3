"""The figures on `comparison.md`, from `bench/results`: `python -m docs.tooling.figures [--check]`.

A figure stands behind a comment that names its file and where it lies there: `<!-- FILE: a.b.0 --> 12`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "comparison.md"
RESULTS = ROOT / "bench" / "results"
_FIGURE = re.compile(r"<!-- ([a-z0-9_]+): ([a-z0-9_.]+) --> ([0-9.,]+(?<![.,]))")


def figures_filled_in(text: str) -> str:
    """Return `text` with every figure as the results have it.

    Raises:
        FileNotFoundError, KeyError: there is no such result.
    """
    return _FIGURE.sub(lambda found: f"<!-- {found[1]}: {found[2]} --> {_figure(found[1], found[2])}", text)


def _figure(file: str, path: str) -> str:
    value: Any = json.loads((RESULTS / f"{file}.json").read_text("utf-8"))
    value = value.get("result", value)
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` return 1 where it differs from the results."""
    text = PAGE.read_text("utf-8")
    filled = figures_filled_in(text)
    if "--check" in arguments:
        return int(filled != text)
    PAGE.write_text(filled, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
