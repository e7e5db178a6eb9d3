"""The table of an experiment: a line for each run, as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table

from lorafleet.api import Json
from lorafleet.experiment.plan import Cell

_SECONDS_PER_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Line:
    """One run. Scores are of the task's metric on the test rows; None where the run gave none.

    Attributes:
        status: `succeeded`, `failed`, `cancelled` or `refused`.
        lift: the adapter's score minus the base's, with its 95 % bootstrap interval drawn in pairs.
        collapsed: whether the adapter gives one and the same answer to prompts whose answers differ.
        majority, naive_bayes: scores of trivial answers on the whole test file, where the task states them.
    """

    base: str
    task: str
    recipe: str
    status: str
    metric: str
    base_score: float | None = None
    adapter_score: float | None = None
    lift: float | None = None
    lift_low: float | None = None
    lift_high: float | None = None
    collapsed: bool | None = None
    majority: float | None = None
    naive_bayes: float | None = None
    train_rows: int = 0
    test_rows: int = 0
    trained_tokens: int | None = None
    minutes: float | None = None
    model: str = ""
    error: str = ""


COLUMNS = tuple(field.name for field in fields(Line))


def line_of(cell: Cell, outcome: Json) -> Line:
    """Return the line of a run that has ended; `outcome` is the job as the API shows it."""
    facts = outcome.get("lorafleet") or {}
    measured: Mapping[str, Any] = next(
        (m for m in facts.get("evaluation") or () if m["name"] == cell.task.metric_name), {}
    )
    base, adapter = measured.get("base_value"), measured.get("adapter_value")
    began, ended = facts.get("started_at"), outcome.get("finished_at")
    return Line(
        base=cell.base,
        task=cell.task.name,
        recipe=cell.recipe_name,
        status=str(outcome.get("status") or "unknown"),
        metric=cell.task.metric.name,
        base_score=base,
        adapter_score=adapter,
        lift=None if base is None or adapter is None else adapter - base,
        lift_low=measured.get("lift_ci_low"),
        lift_high=measured.get("lift_ci_high"),
        collapsed=bool(facts.get("collapsed")) if measured else None,
        majority=cell.task.baselines.get("majority_label_accuracy"),
        naive_bayes=cell.task.baselines.get("word_naive_bayes_accuracy"),
        train_rows=len(cell.task.train),
        test_rows=int(measured.get("rows") or 0),
        trained_tokens=outcome.get("trained_tokens"),
        minutes=None if began is None or ended is None else (ended - began) / _SECONDS_PER_MINUTE,
        model=str(outcome.get("fine_tuned_model") or ""),
        error=str((outcome.get("error") or {}).get("message") or ""),
    )


def as_csv(lines: Sequence[Line]) -> str:
    """Return the table as CSV with a header; empty cells where a run gave nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if v is None else v for name, v in asdict(line).items()} for line in lines)
    return text.getvalue()


def as_json(name: str, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the table with its sums as one JSON object."""
    scored = [line for line in lines if line.lift is not None]
    return {
        "experiment": name,
        "runs": len(lines),
        "succeeded": sum(line.status == "succeeded" for line in lines),
        "above_base": sum((line.lift or 0) > 0 for line in scored),
        "surely_above_base": sum((line.lift_low or 0) > 0 for line in scored),
        "collapsed": [f"{line.base}/{line.task}/{line.recipe}" for line in scored if line.collapsed],
        "mean_lift": sum(line.lift or 0 for line in scored) / len(scored) if scored else None,
        "lines": [asdict(line) for line in lines],
    }


def as_table(name: str, lines: Sequence[Line]) -> Table:
    """Return the table for people."""
    table = Table(title=name, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("task", "base model", "recipe", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("base", "adapter", "lift", "95 % interval", "majority", "rows", "min"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remark")
    for line in lines:
        table.add_row(
            line.task,
            line.base,
            line.recipe,
            line.metric,
            _score(line.base_score),
            _score(line.adapter_score),
            _signed(line.lift),
            "" if line.lift_low is None else f"{line.lift_low:+.2f} to {line.lift_high:+.2f}",
            _score(line.majority),
            str(line.test_rows),
            "" if line.minutes is None else f"{line.minutes:.1f}",
            _remark(line),
        )
    table.caption = "lift: adapter minus base, with its interval by paired bootstrap over the test rows"
    return table


def _remark(line: Line) -> str:
    if line.status != "succeeded":
        return f"{line.status}: {line.error}"
    return "collapsed to one answer" if line.collapsed else ""


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
