"""The instruction generator: seeded, well formed, and apart from the demo tasks."""

import json
import re
from itertools import islice

from assets.demo_tasks import DEMO_TASKS, draw_rows
from assets.demo_words import DEMO_WORDS
from assets.instructions import InstructionGenerator


def test_same_seed_same_text() -> None:
    first = list(islice(InstructionGenerator(3).plain_documents(), 500))
    again = list(islice(InstructionGenerator(3).plain_documents(), 500))
    other = list(islice(InstructionGenerator(4).plain_documents(), 500))
    assert first == again
    assert first != other


def test_rows_have_the_data_format() -> None:
    for row in islice(InstructionGenerator(5).rows(), 3000):
        assert row.prompt.endswith("\n")
        assert not row.prompt.endswith("\n\n")
        assert row.completion
        assert row.completion == row.completion.strip()
        assert "\n" not in row.completion


def test_json_answers_parse_and_come_from_the_prompt() -> None:
    answers = [row for row in islice(InstructionGenerator(6).rows(), 5000) if row.completion.startswith("{")]
    assert len(answers) > 200
    for row in answers:
        record = json.loads(row.completion)
        named = [value for value in record.values() if isinstance(value, str)]
        assert all(value in row.prompt for value in named), row


def test_chats_end_with_the_assistant_and_alternate() -> None:
    for turns in islice(InstructionGenerator(7).chats(), 500):
        spoken = [turn.role for turn in turns if turn.role != "system"]
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert spoken


def test_every_kind_is_drawn_with_many_wordings() -> None:
    documents = list(islice(InstructionGenerator(8).plain_documents(), 20_000))
    assert len(set(documents)) > 0.85 * len(documents)


def test_no_demo_prompt_answer_or_word_occurs() -> None:
    text = "\n".join(islice(InstructionGenerator(1).plain_documents(), 30_000)).lower()
    for task in DEMO_TASKS:
        assert task.instruction.lower() not in text
        completions = {row["completion"] for row in draw_rows(task, seed=7)}
        lines = set(text.splitlines())
        assert not completions & lines, task.name
    found = [word for word in DEMO_WORDS if re.search(rf"\b{re.escape(word)}\b", text)]
    assert found == []
