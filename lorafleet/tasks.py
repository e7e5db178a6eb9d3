"""Tasks: rows to train on, rows to test on, and how answers are scored."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorafleet
from services.common.scoring import METRICS, Metric, Target

GENERATED_TASKS = (
    "support_routing",
    "order_json",
    "home_commands",
    "word_sums",
    "polite_requests",
    "train_notices",
)
_GENERATE_SECONDS = 120
_TASK_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_]{0,60}[a-z0-9])?")
# Longest answer that is asked for; the tasks' own are far shorter.
_MAX_ANSWER_TOKENS = 192
_SPARE_TOKENS = 8

# Where a type of task reads its metric in its own way.
_METRICS_BY_TYPE = {
    ("exact_match", "text_to_sql"): "sql_match",
    ("exact_match", "maths"): "numeric",
    ("accuracy", "multiple_choice"): "choice_letter",
    # Generated programs are not run here; their text is compared instead.
    ("pass_at_1", "code"): "rouge_l",
}


class TaskError(Exception):
    """A task cannot be used; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    prompt: str
    target: Target


@dataclass(frozen=True, slots=True)
class Task:
    """One task, already cut to the rows that are used.

    Attributes:
        metric_name: its metric, by the name that a job asks for it.
        rows_left_out: training rows that the cut left out.
        baselines: scores of trivial answers on the test rows, by name; empty where none are known.
    """

    name: str
    title: str
    metric_name: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    rows_left_out: int
    baselines: Mapping[str, float]

    @property
    def metric(self) -> Metric:
        """How answers are scored."""
        return METRICS[self.metric_name]

    @property
    def adapter(self) -> str:
        """Name of the adapter that is trained for it."""
        return self.name.replace("_", "-")

    @property
    def stop(self) -> list[str]:
        """Where an answer ends besides the model's own end: at a line break, unless answers have some."""
        return [] if any("\n" in row.target.completion for row in self.train) else ["\n"]

    @property
    def max_answer_tokens(self) -> int:
        """Tokens that every right answer fits in: a token is a byte at least."""
        longest = max(len(row.target.completion.encode()) for row in (*self.train, *self.test))
        return min(_MAX_ANSWER_TOKENS, longest + _SPARE_TOKENS)


def generated_tasks(folder: Path, *, max_train_rows: int, test_rows: int, seed: int = 7) -> list[Task]:
    """Generate the bundled tasks in `folder` and load them.

    Raises:
        TaskError: the generator is not installed, as in a container's image, or failed.
    """
    root = Path(lorafleet.__file__).parents[1]
    if not (root / "assets" / "demo_tasks.py").is_file():
        raise TaskError("this installation has no task generator; name tasks with --data DIR")
    command = [sys.executable, "-m", "assets.demo_tasks", "--out", str(folder.resolve()), "--seed", str(seed)]
    made = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=_GENERATE_SECONDS, check=False
    )
    if made.returncode != 0:
        raise TaskError(f"the tasks could not be generated: {made.stderr.strip()[-1000:]}")
    return load_tasks(folder, GENERATED_TASKS, max_train_rows=max_train_rows, test_rows=test_rows)


def load_tasks(folder: Path, names: Sequence[str], *, max_train_rows: int, test_rows: int) -> list[Task]:
    """Load tasks from `folder/NAME/{TASK.json,train.jsonl,test.jsonl}`.

    Rows above the two limits are left out by a draw that the task's name seeds.

    Raises:
        TaskError: a task is missing, malformed, or scored in a way that is not implemented.
    """
    tasks = []
    for name in names:
        if not _TASK_NAME.fullmatch(name):
            raise TaskError(f"{name!r} is no task name: lower-case letters, digits and _ only")
        tasks.append(_load(folder / name, max_train_rows, test_rows))
    return tasks


def _load(folder: Path, max_train_rows: int, test_rows: int) -> Task:
    try:
        card = json.loads((folder / "TASK.json").read_text("utf-8"))
        train, test = _rows(folder / "train.jsonl"), _rows(folder / "test.jsonl")
        title, metric_name, task_type = str(card["title"]), str(card["metric"]), str(card["task_type"])
        baselines = {str(name): float(value) for name, value in (card.get("baselines") or {}).items()}
    except (OSError, ValueError, KeyError) as error:
        raise TaskError(f"task {folder.name} cannot be read: {error!r}") from error
    metric_name = _METRICS_BY_TYPE.get((metric_name, task_type), metric_name)
    if metric_name not in METRICS:
        raise TaskError(f"task {folder.name} is scored by {metric_name}, which cannot be computed here")
    if not train or not test:
        raise TaskError(f"task {folder.name} has no rows")
    kept = _drawn(train, max_train_rows, folder.name)
    return Task(
        name=folder.name,
        title=title,
        metric_name=metric_name,
        train=tuple(kept),
        test=tuple(_drawn(test, test_rows, folder.name)),
        rows_left_out=len(train) - len(kept),
        baselines=baselines,
    )


def _rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as lines:
        return [_row(json.loads(line)) for line in lines]


def _row(value: dict[str, Any]) -> Row:
    target = Target(
        completion=str(value["completion"]),
        references=tuple(value.get("references", ())),
        answer=str(value["answer"]) if "answer" in value else None,
    )
    return Row(str(value["prompt"]), target)


def _drawn(rows: list[Row], limit: int, name: str) -> list[Row]:
    if len(rows) <= limit:
        return rows
    return random.Random(name).sample(rows, limit)  # noqa: S311 - a draw of rows, no secret


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a data file: `prompt`, `completion`, and what else answers are compared with."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            value: dict[str, Any] = {"prompt": row.prompt, "completion": row.target.completion}
            if row.target.references:
                value["references"] = row.target.references
            if row.target.answer is not None:
                value["answer"] = row.target.answer
            file.write(json.dumps(value) + "\n")
