"""Generates the six small tasks of the demo, each of another kind.

    python -m assets.demo_tasks --out DIR --seed 7

Each task is a folder with `train.jsonl`, `test.jsonl` and `TASK.json`; the same seed gives the same bytes,
and no prompt of a test file is in its train file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from assets.demo_sentences import DEPARTMENTS, cafe_order, home_wish, support_message
from assets.demo_writing import polite_request, sum_story, train_notice

TRAIN_ROWS = 480
TEST_ROWS = 120


@dataclass(frozen=True, slots=True)
class DemoTask:
    """One task: what the prompt says around the input text, and how answers are scored."""

    name: str
    title: str
    task_type: str
    metric: str
    metric_detail: str
    label_set: tuple[str, ...] | None
    instruction: str
    text_label: str
    answer_label: str
    draw: Callable[[Random], tuple[str, str]]

    def prompt(self, text: str) -> str:
        return f"{self.instruction}\n\n{self.text_label}: {text}\n\n{self.answer_label}:\n"


DEMO_TASKS = (
    DemoTask(
        name="support_routing",
        title="Route a customer's message to a department",
        task_type="classification",
        metric="accuracy",
        metric_detail="Share of test rows whose output, without outer blanks, is the completion.",
        label_set=DEPARTMENTS,
        instruction="Which department should answer this customer?",
        text_label="Message",
        answer_label="Department",
        draw=support_message,
    ),
    DemoTask(
        name="order_json",
        title="Write a café order as a JSON object",
        task_type="structured_output",
        metric="exact_match",
        metric_detail="Share of test rows whose output, without outer blanks, is the completion.",
        label_set=None,
        instruction="Write the order as JSON with dish, size and drink.",
        text_label="Order",
        answer_label="JSON",
        draw=cafe_order,
    ),
    DemoTask(
        name="home_commands",
        title="Turn a wish into a home automation command",
        task_type="structured_output",
        metric="exact_match",
        metric_detail="Share of test rows whose output, without outer blanks, is the completion.",
        label_set=None,
        instruction="Write the command for the smart home.",
        text_label="Wish",
        answer_label="Command",
        draw=home_wish,
    ),
    DemoTask(
        name="word_sums",
        title="Work out a sum that is told in words",
        task_type="arithmetic",
        metric="exact_match",
        metric_detail="Share of test rows whose output, without outer blanks, is the completion.",
        label_set=None,
        instruction="Say how many there are in the end.",
        text_label="Told",
        answer_label="In the end",
        draw=sum_story,
    ),
    DemoTask(
        name="polite_requests",
        title="Rewrite a blunt order as a polite request",
        task_type="style_rewrite",
        metric="exact_match",
        metric_detail="Share of test rows whose output, without outer blanks, is the completion.",
        label_set=None,
        instruction="Rewrite it as a polite request.",
        text_label="Blunt",
        answer_label="Polite",
        draw=polite_request,
    ),
    DemoTask(
        name="train_notices",
        title="Announce a train from its record",
        task_type="data_to_text",
        metric="rouge_l",
        metric_detail="Mean ROUGE-L F1 of the output and the completion.",
        label_set=None,
        instruction="Announce the train in a sentence.",
        text_label="Record",
        answer_label="Notice",
        draw=train_notice,
    ),
)


def draw_rows(task: DemoTask, seed: int) -> list[dict[str, str]]:
    """Returns `TRAIN_ROWS + TEST_ROWS` rows (`prompt`, `completion`) whose prompts all differ."""
    rng = Random(f"{task.name}:{seed}")
    completions: dict[str, str] = {}
    while len(completions) < TRAIN_ROWS + TEST_ROWS:
        text, completion = task.draw(rng)
        completions[task.prompt(text)] = completion
    return [{"prompt": prompt, "completion": completion} for prompt, completion in completions.items()]


def write_task(task: DemoTask, out: Path, seed: int) -> Path:
    """Writes one task's folder under `out` and returns it."""
    rows = draw_rows(task, seed)
    parts = {"train": rows[:TRAIN_ROWS], "test": rows[TRAIN_ROWS:]}
    assert not {row["prompt"] for row in parts["train"]} & {row["prompt"] for row in parts["test"]}
    folder = out / task.name
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, part_rows in parts.items():
        lines = [
            json.dumps({"id": f"{task.name}-{part}-{number:04d}", **row})
            for number, row in enumerate(part_rows)
        ]
        content = ("\n".join(lines) + "\n").encode()
        (folder / f"{part}.jsonl").write_bytes(content)
        files[part] = {
            "rows": len(part_rows),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    card = {
        "name": task.name,
        "title": task.title,
        "task_type": task.task_type,
        "description": f"{task.title}. Generated from templates by assets/demo_tasks.py with seed {seed}.",
        "metric": task.metric,
        "metric_detail": task.metric_detail,
        "label_set": task.label_set,
        "split": "Random rows of the same templates; no prompt is in both parts.",
        "row_fields": ["id", "prompt", "completion"],
        "files": files,
    }
    (folder / "TASK.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the demo's tasks.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    for task in DEMO_TASKS:
        print(write_task(task, arguments.out, arguments.seed))


if __name__ == "__main__":
    main()
