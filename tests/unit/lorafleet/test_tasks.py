"""The demo's tasks and the figures of its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorafleet.demo.report import load_of
from lorafleet.demo.traffic import Answer, Ask, Round
from lorafleet.tasks import TaskError, generated_tasks, load_tasks, write_rows
from services.common import scoring
from services.common.scoring import Target


def write_task(folder: Path, card: dict[str, Any], rows: int = 30, **row: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "TASK.json").write_text(json.dumps({"title": "T", "task_type": "classification", **card}))
    for part in ("train", "test"):
        lines = [
            json.dumps({"id": f"{part}-{n}", "prompt": f"{part} {n}\n", "completion": "yes", **row})
            for n in range(rows)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


def test_rows_above_the_limits_are_left_out_the_same_way_each_time(tmp_path: Path) -> None:
    write_task(tmp_path / "one", {"metric": "accuracy"})
    (first,) = load_tasks(tmp_path, ["one"], max_train_rows=10, test_rows=5)
    (again,) = load_tasks(tmp_path, ["one"], max_train_rows=10, test_rows=5)
    assert first == again
    assert (len(first.train), first.rows_left_out, len(first.test)) == (10, 20, 5)
    assert len({row.prompt for row in first.train}) == 10


@pytest.mark.parametrize(
    ("metric", "task_type", "expected"),
    [
        ("accuracy", "classification", scoring.ACCURACY),
        ("accuracy", "multiple_choice", scoring.LETTER_ACCURACY),
        ("exact_match", "text_to_sql", scoring.QUERY_MATCH),
        ("exact_match", "maths", scoring.NUMBER_MATCH),
        ("exact_match", "structured_output", scoring.EXACT_MATCH),
        ("entity_f1", "ner", scoring.ENTITY_F1),
    ],
)
def test_the_type_of_task_decides_how_its_metric_reads(
    tmp_path: Path, metric: str, task_type: str, expected: scoring.Metric
) -> None:
    write_task(tmp_path / "one", {"metric": metric, "task_type": task_type})
    (task,) = load_tasks(tmp_path, ["one"], max_train_rows=10, test_rows=5)
    assert task.metric is expected


def test_answers_end_at_a_line_break_unless_they_hold_some(tmp_path: Path) -> None:
    write_task(tmp_path / "flat", {"metric": "accuracy"})
    write_task(tmp_path / "lines", {"metric": "rouge_l"}, completion="one\ntwo", references=["a", "b"])
    flat, lines = load_tasks(tmp_path, ["flat", "lines"], max_train_rows=10, test_rows=5)
    assert flat.stop == ["\n"]
    assert lines.stop == []
    assert lines.test[0].target == Target("one\ntwo", references=("a", "b"))
    assert flat.max_answer_tokens == len("yes") + 8


def test_data_files_hold_what_answers_are_compared_with(tmp_path: Path) -> None:
    write_task(tmp_path / "one", {"metric": "rouge_l", "baselines": None}, references=["a"], level=3)
    (task,) = load_tasks(tmp_path, ["one"], max_train_rows=3, test_rows=3)
    write_rows(task.train, tmp_path / "file.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "file.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(set(row) == {"prompt", "completion", "references"} for row in rows)


@pytest.mark.parametrize(
    ("name", "card", "message"),
    [
        ("absent", None, "absent cannot be read"),
        ("../one", None, "is no task name"),
        ("code", {"metric": "pass_at_1"}, "scored by pass_at_1"),
        ("cardless", {"no_metric": 1}, "cardless cannot be read"),
    ],
)
def test_unusable_tasks_are_named(
    tmp_path: Path, name: str, card: dict[str, Any] | None, message: str
) -> None:
    if card is not None:
        write_task(tmp_path / name, card)
    with pytest.raises(TaskError, match=message):
        load_tasks(tmp_path, [name], max_train_rows=3, test_rows=3)


def test_the_generated_tasks_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = generated_tasks(Path("tasks"), max_train_rows=1000, test_rows=50)
    assert len(list((tmp_path / "tasks").iterdir())) == len(tasks)
    assert len({task.adapter for task in tasks}) == 6
    for task in tasks:
        assert len(task.test) == 50
        assert not {row.prompt for row in task.train} & {row.prompt for row in task.test}
        right = [row.target.completion for row in task.test]
        targets = [row.target for row in task.test]
        assert scoring.score(task.metric, right, targets).value == 1.0


def test_figures_of_a_load() -> None:
    ask = Ask("m", "p", 8, ())
    answers = [
        Answer(ask, "ab", tokens=4, began_at=0.0, piece_times=[1.0, 1.2, 1.4], ended_at=2.0),
        Answer(ask, "", tokens=1, began_at=1.0, piece_times=[], ended_at=4.0),
    ]
    load = load_of("both", Round(answers), streams=2)
    assert (load.requests, load.completion_tokens, load.seconds) == (2, 5, 4.0)
    assert load.tokens_per_second == pytest.approx(1.25)
    # First text after 1 s; the other had none and took 3 s.
    assert load.first_token_p50_seconds == pytest.approx(2.0)
    assert load.between_tokens_p50_seconds == pytest.approx(0.2)
