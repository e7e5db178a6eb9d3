"""The table of an experiment as text, CSV and JSON: a line for each run, and the sums."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from lorafleet.experiment.line import COLUMNS, Line
from lorafleet.experiment.summary import correlations, summary

_KIB = 1024


def as_csv(lines: Sequence[Line], heuristics: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table as CSV with a header, the heuristics last; empty cells where there is nothing."""
    text = io.StringIO()
    names = sorted({name for figures in heuristics.values() for name in figures})
    writer = csv.DictWriter(text, [*COLUMNS, *names], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        row = asdict(line) | {name: heuristics[line.task][name] for name in names}
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return text.getvalue()


def as_json(
    name: str, lines: Sequence[Line], heuristics: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Return the table with its sums, the heuristics and their correlations as one JSON object."""
    return {
        "experiment": name,
        **summary(lines),
        "correlations": correlations(lines, heuristics),
        "heuristics": {task: dict(figures) for task, figures in heuristics.items()},
        "lines": [asdict(line) for line in lines],
    }


def as_table(name: str, lines: Sequence[Line]) -> Table:
    """Return the table for people."""
    table = Table(title=name, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    # What is the same in every line is left out.
    several_bases = len({line.base for line in lines}) > 1
    several_recipes = len({line.recipe for line in lines}) > 1
    names = ["task", *["base model"] * several_bases, *["recipe"] * several_recipes, "metric"]
    for column in names:
        table.add_column(column, no_wrap=True)
    for column in ("base", "adapter", "lift", "95 % interval", "majority", "bayes", "rows", "min", "KiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remark")
    for line in lines:
        table.add_row(
            line.task,
            *[line.base] * several_bases,
            *[line.recipe] * several_recipes,
            line.metric,
            _score(line.base_score),
            _score(line.adapter_score),
            "" if line.lift is None else f"{line.lift:+.3f}",
            "" if line.lift_low is None else f"{line.lift_low:+.2f} to {line.lift_high:+.2f}",
            _score(line.majority),
            _score(line.naive_bayes),
            str(line.test_rows),
            "" if line.minutes is None else f"{line.minutes:.1f}",
            "" if line.adapter_bytes is None else f"{line.adapter_bytes / _KIB:.0f}",
            remark(line),
        )
    table.caption = "lift: adapter minus base, with its interval by paired bootstrap over the test rows"
    return table


def remark(line: Line) -> str:
    """Return what is to be said about a run besides its figures."""
    remarks = []
    if line.status != "succeeded":
        remarks.append(f"{line.status}: {line.error}")
    if line.collapsed:
        remarks.append("collapsed to one answer")
    if line.retry_of:
        remarks.append(f"second run of {line.retry_of}")
    if not line.stands:
        remarks.append("not counted")
    if line.unanswered_rows:
        remarks.append(f"{line.unanswered_rows} rows refused")
    if line.agrees is False:
        remarks.append(f"the trainer measured {line.trainer_adapter_score:.3f}")
    return "; ".join(remarks)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
