"""The demo's tasks: seeded, in the data format, split without overlap, and answerable from the prompt."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from assets.demo_sentences import ROOMS
from assets.demo_tasks import DEMO_TASKS, TEST_ROWS, TRAIN_ROWS, DemoTask, draw_rows, write_task

BASE = Path(__file__).parents[3] / "assets" / "base"


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.name)
def test_same_seed_same_bytes(task: DemoTask, tmp_path: Path) -> None:
    first, again = write_task(task, tmp_path / "a", seed=7), write_task(task, tmp_path / "b", seed=7)
    other = write_task(task, tmp_path / "c", seed=8)
    for name in ("train.jsonl", "test.jsonl", "TASK.json"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.name)
def test_parts_are_whole_and_do_not_overlap(task: DemoTask, tmp_path: Path) -> None:
    folder = write_task(task, tmp_path, seed=7)
    train, test = _rows(folder / "train.jsonl"), _rows(folder / "test.jsonl")
    card = json.loads((folder / "TASK.json").read_text(encoding="utf-8"))
    assert (len(train), len(test)) == (TRAIN_ROWS, TEST_ROWS)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len({row["id"] for row in [*train, *test]}) == TRAIN_ROWS + TEST_ROWS
    for part in ("train", "test"):
        content = (folder / f"{part}.jsonl").read_bytes()
        assert card["files"][part]["sha256"] == hashlib.sha256(content).hexdigest()
    for row in [*train, *test]:
        assert set(row) == {"id", "prompt", "completion"}
        assert row["prompt"].endswith(":\n")
        assert row["completion"] == row["completion"].strip()


@pytest.mark.parametrize("task", DEMO_TASKS, ids=lambda task: task.name)
def test_rows_are_short_for_the_bundled_tokenizer(task: DemoTask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for row in draw_rows(task, seed=7):
        assert len(tokenizer(row["prompt"]).input_ids) < 64
        assert len(tokenizer(row["completion"]).input_ids) <= 30


def test_no_answer_is_common_enough_to_guess() -> None:
    for task in DEMO_TASKS:
        completions = [row["completion"] for row in draw_rows(task, seed=7)]
        most = max(completions.count(answer) for answer in set(completions))
        assert most / len(completions) < 0.25, task.name


def test_labels_are_the_label_set() -> None:
    for task in DEMO_TASKS:
        if task.label_set is not None:
            assert {row["completion"] for row in draw_rows(task, seed=7)} == set(task.label_set)


def test_orders_hold_what_the_sentence_says() -> None:
    task = next(task for task in DEMO_TASKS if task.name == "order_json")
    for row in draw_rows(task, seed=7):
        order = json.loads(row["completion"])
        assert list(order) == ["dish", "size", "drink"]
        assert all(value in row["prompt"] for value in order.values())


def test_commands_name_the_room_and_level_of_the_wish() -> None:
    task = next(task for task in DEMO_TASKS if task.name == "home_commands")
    for row in draw_rows(task, seed=7):
        device, *words = row["completion"].split()
        kind, room = device.split(".")
        assert kind in {"light", "heat", "blind", "fan"}
        assert room in ROOMS
        assert f"in the {room}" in row["prompt"]
        assert all(f" {word.split('=')[1]}" in row["prompt"] for word in words if "=" in word)


def _of(name: str) -> list[dict[str, str]]:
    return draw_rows(next(task for task in DEMO_TASKS if task.name == name), seed=7)


def test_sums_are_right() -> None:
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for row in _of("word_sums"):
        told = [numbers[word] for word in re.findall(r"\w+", row["prompt"]) if word in numbers]
        result, thing = row["completion"].split()
        assert thing in row["prompt"]
        fewer = any(word in row["prompt"] for word in ("gave away", "used", "threw out", "mislays"))
        assert int(result) == (told[0] - told[1] if fewer else told[0] + told[1])


def test_requests_and_notices_say_all_that_was_given() -> None:
    for row in _of("polite_requests"):
        words = row["completion"].removeprefix("Could you please ").removesuffix("?").split()
        assert all(word.lower() in row["prompt"].lower() for word in words)
    for row in _of("train_notices"):
        given = re.findall(r"\w+\[(\w+)\]", row["prompt"])
        assert len(given) == 5
        assert all(re.search(rf"\b{value}\b", row["completion"]) for value in given)
