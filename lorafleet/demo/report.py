"""What the demo found, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lorafleet.demo.traffic import Round
from services.common.scoring import Score

_MILLISECONDS = 1000


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What fine-tuning did for one task."""

    task: str
    metric: str
    base: Score
    adapter: Score
    lift: Score
    train_rows: int
    train_rows_left_out: int
    train_rows_too_long: int
    test_rows: int
    training_seconds: float
    model: str


@dataclass(frozen=True, slots=True)
class Load:
    """Serving figures of one load, over the requests that were answered; times in seconds."""

    name: str
    streams: int
    requests: int
    failures: dict[str, int]
    """Requests that were not answered, by the error's code."""
    completion_tokens: int
    seconds: float
    tokens_per_second: float
    first_token_p50_seconds: float
    first_token_p95_seconds: float
    between_tokens_p50_seconds: float
    between_tokens_p95_seconds: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many answers of the mixed load were, to the letter, the answers given alone."""

    equal: int
    total: int


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the demo measured."""

    base: str
    tasks: tuple[TaskResult, ...]
    loads: tuple[Load, ...]
    agreement: Agreement
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return asdict(self)


def load_of(name: str, came: Round, *, streams: int) -> Load:
    """Return the figures of one load; there must be answers."""
    answers = came.answers
    seconds = max(answer.ended_at for answer in answers) - min(answer.began_at for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    first = [answer.first_piece_seconds for answer in answers]
    gaps = [gap for answer in answers for gap in answer.piece_gaps_seconds] or [0.0]
    return Load(
        name=name,
        streams=streams,
        requests=len(answers),
        failures=dict(came.failures),
        completion_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token_p50_seconds=float(np.percentile(first, 50)),
        first_token_p95_seconds=float(np.percentile(first, 95)),
        between_tokens_p50_seconds=float(np.percentile(gaps, 50)),
        between_tokens_p95_seconds=float(np.percentile(gaps, 95)),
    )


def print_report(report: Report, console: Console) -> None:
    """Print the report for people."""
    console.print(_task_table(report))
    for task in report.tasks:
        if task.train_rows_left_out or task.train_rows_too_long:
            console.print(
                f"  {task.task}: trained on {task.train_rows} rows; {task.train_rows_left_out} left out to "
                f"keep the demo short, {task.train_rows_too_long} longer than the training length"
            )
    console.print(load_table(report.loads))
    agreement = report.agreement
    console.print(
        f"answers served mixed that equal the same ones served alone: {agreement.equal} of {agreement.total}"
    )
    console.print(_failures(report.loads))
    console.print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items()))


def _task_table(report: Report) -> Table:
    table = _table(f"fine-tuned adapters against the base {report.base}", "task", "metric")
    for column in ("base", "adapter", "lift", "95 % interval", "rows", "train"):
        table.add_column(column, justify="right", no_wrap=True)
    for task in report.tasks:
        table.add_row(
            task.task,
            task.metric,
            f"{task.base.value:.3f}",
            f"{task.adapter.value:.3f}",
            f"{task.lift.value:+.3f}",
            f"{task.lift.low:+.2f} to {task.lift.high:+.2f}",
            str(task.test_rows),
            f"{task.training_seconds:.0f} s",
        )
    table.caption = "95 % interval: of the lift, by paired bootstrap over the test rows"
    return table


def load_table(loads: Sequence[Load]) -> Table:
    """Return loads as a table for people."""
    table = _table("serving", "load")
    for column in ("streams", "requests", "tokens/s", "TTFT p50", "p95", "gap p50", "p95"):
        table.add_column(column, justify="right", no_wrap=True)
    for load in loads:
        table.add_row(
            load.name,
            str(load.streams),
            str(load.requests),
            f"{load.tokens_per_second:.0f}",
            _milliseconds(load.first_token_p50_seconds),
            _milliseconds(load.first_token_p95_seconds),
            _milliseconds(load.between_tokens_p50_seconds),
            _milliseconds(load.between_tokens_p95_seconds),
        )
    table.caption = "TTFT: time to the first token, as the client sees it; gap: between tokens"
    return table


def _failures(loads: Sequence[Load]) -> str:
    failures: Counter[str] = Counter()
    for load in loads:
        failures.update(load.failures)
    total = sum(load.requests for load in loads) + failures.total()
    reasons = ", ".join(f"{count} {code}" for code, count in failures.most_common())
    return f"requests that failed: {failures.total()} of {total}" + (f" ({reasons})" if reasons else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * _MILLISECONDS:.0f} ms"
