"""Training files: what is accepted, and that every bad line is named.

The numbers in the test ids are those of the fault catalogue.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common.errors import InvalidArgument
from services.trainer.dataset import ConversationRow, PromptRow, Schema, read_dataset

GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def chat(*messages: dict[str, object]) -> bytes:
    return line({"messages": list(messages)})


def turn(role: str, content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    return path


def refusal(tmp_path: Path, data: bytes, **options: int) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        read_dataset(written(tmp_path, data), **options)  # type: ignore[arg-type]
    assert caught.value.reason == "invalid_dataset"
    return caught.value


BAD = [
    pytest.param(b"", "empty_dataset", None, None, id="45 empty"),
    pytest.param(b"\n  \n\r\n", "empty_dataset", None, None, id="45 blank lines"),
    pytest.param(b"\xef\xbb\xbf", "empty_dataset", None, None, id="45 BOM only"),
    pytest.param(line(GOOD) * 6 + b'{"prompt": "a" "completion"}\n', "bad_json_line", 7, 16, id="46 line 7"),
    pytest.param(line(GOOD)[:-2] + b",}\n", "bad_json_line", 1, None, id="47 trailing comma"),
    pytest.param(b'{"prompt":"a"} {"prompt":"b"}\n', "bad_json_line", 1, 16, id="47 two objects"),
    pytest.param(line(GOOD) + b'{"prompt": "a', "bad_json_line", 2, None, id="47 unterminated"),
    pytest.param(b"[1, 2]\n", "bad_json_line", 1, 1, id="46 no object"),
    pytest.param(b'{"prompt":' + b"[" * 100_000 + b"\n", "bad_json_line", 1, None, id="46 deep"),
    pytest.param(b'{"prompt":"a","prompt":"b","completion":"c"}\n', "duplicate_key", 1, None, id="46 key"),
    pytest.param(json.dumps(GOOD).encode("utf-16"), "not_utf8", 1, None, id="48 UTF-16"),
    pytest.param(line(GOOD) + b'{"prompt": "\xe9"}\n', "not_utf8", 2, None, id="48 Latin-1"),
    pytest.param(line(GOOD) * 2 + line(CHAT), "mixed_schema", 3, None, id="49 mixed"),
    pytest.param(chat(turn("robot"), turn("assistant")), "bad_messages", 1, None, id="50 role"),
    pytest.param(chat(turn("user", ""), turn("assistant")), "bad_messages", 1, None, id="50 empty content"),
    pytest.param(chat(turn("user", None), turn("assistant")), "bad_messages", 1, None, id="50 null content"),
    pytest.param(chat(turn("user")), "bad_messages", 1, None, id="50 no assistant"),
    pytest.param(chat(turn("assistant"), turn("user")), "bad_messages", 1, None, id="50 assistant first"),
    pytest.param(chat(turn("user"), turn("assistant"), turn("user")), "bad_messages", 1, None, id="50 last"),
    pytest.param(chat(turn("system"), turn("assistant")), "bad_messages", 1, None, id="50 system, assistant"),
    pytest.param(
        chat(turn("user"), turn("system"), turn("assistant")), "bad_messages", 1, None, id="50 late system"
    ),
    pytest.param(
        chat(turn("user"), turn("assistant", weight=0)), "bad_messages", 1, None, id="50 nothing weighs"
    ),
    pytest.param(
        chat(turn("user"), turn("assistant", weight=True)), "bad_messages", 1, None, id="50 weight true"
    ),
    pytest.param(
        chat(turn("user", weight=1), turn("assistant")), "bad_messages", 1, None, id="50 user weight"
    ),
    pytest.param(
        chat(turn("user"), turn("assistant", tool_calls=[])), "bad_messages", 1, None, id="50 unknown key"
    ),
    pytest.param(line({"messages": []}), "bad_messages", 1, None, id="50 no messages"),
    pytest.param(line({"messages": ["hi"]}), "bad_messages", 1, None, id="50 text message"),
    pytest.param(line({"text": "a"}), "unknown_schema", 1, None, id="no schema"),
    pytest.param(line({**GOOD, "system": "s"}), "unknown_field", 1, None, id="field without effect"),
    pytest.param(line({"prompt": "a"}), "bad_completion", 1, None, id="no completion"),
    pytest.param(line({"prompt": 3, "completion": "b"}), "bad_prompt", 1, None, id="number as prompt"),
    pytest.param(b'{"prompt": NaN, "completion": "b"}\n', "bad_number", 1, 12, id="53 NaN"),
    pytest.param(b'{"prompt": "NaN", "id": -Infinity}\n', "bad_number", 1, 25, id="53 Infinity"),
    pytest.param(b'{"id": 9007199254740993}\n', "bad_number", 1, None, id="53 2^53 + 1"),
    pytest.param(b'{"id": ' + b"9" * 100_000 + b"}\n", "bad_number", 1, None, id="53 long number"),
    pytest.param(b'{"prompt": "\\ud800", "completion": "b"}\n', "lone_surrogate", 1, None, id="53 surrogate"),
]


@pytest.mark.parametrize(("data", "reason", "number", "column"), BAD)
def test_bad_file_is_refused_by_line(
    tmp_path: Path, data: bytes, reason: str, number: int | None, column: int | None
) -> None:
    violation = refusal(tmp_path, data).violations[0]
    assert violation.reason == reason, violation
    assert violation.field.startswith("training_file" if number is None else f"training_file.lines[{number}]")
    if number is not None:
        assert violation.description.startswith(f"line {number}")
    if column is not None:
        assert f"column {column}:" in violation.description


def test_every_bad_line_is_named_up_to_twenty(tmp_path: Path) -> None:
    data = b"".join(b"broken\n" if i % 2 else line(GOOD) for i in range(60))
    error = refusal(tmp_path, data)
    assert [violation.field for violation in error.violations] == [
        f"training_file.lines[{number}]" for number in range(2, 42, 2)
    ]
    assert error.metadata["fault_count"] == "30"
    assert "10 more" in error.message


def test_fault_names_the_field_inside_the_row(tmp_path: Path) -> None:
    violation = refusal(tmp_path, chat(turn("user"), turn("robot"), turn("assistant"))).violations[0]
    assert violation.field == "training_file.lines[1].messages[1].role"
    assert "system, user, assistant, tool" in violation.description


def test_long_line_is_refused_and_reading_goes_on(tmp_path: Path) -> None:
    long_line = line({"prompt": "x" * 5000, "completion": "y"})
    error = refusal(tmp_path, line(GOOD) + long_line + b"broken\n", line_limit_bytes=1000)
    assert [v.reason for v in error.violations] == ["line_too_large", "bad_json_line"]
    assert [v.field for v in error.violations] == ["training_file.lines[2]", "training_file.lines[3]"]


def test_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    row = line(GOOD)
    assert len(read_dataset(written(tmp_path, row), line_limit_bytes=len(row) - 1).rows) == 1


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xef\xbb\xbf" + line(GOOD), id="BOM"),
        pytest.param(line(GOOD).replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(line(GOOD).rstrip(b"\n"), id="no end of line"),
        pytest.param(b"\n\n" + line(GOOD) + b"\n", id="blank lines"),
        pytest.param(line({**GOOD, "id": "x-1", "metadata": {"k": [1]}}), id="annotations"),
    ],
)
def test_harmless_oddities_are_accepted(tmp_path: Path, data: bytes) -> None:
    dataset = read_dataset(written(tmp_path, data))
    assert dataset.schema is Schema.PROMPT_COMPLETION
    (row,) = dataset.rows
    assert isinstance(row, PromptRow)
    assert (row.prompt, row.completion) == ("a", "b")


def test_conversation_keeps_its_messages(tmp_path: Path) -> None:
    messages = [turn("system"), turn("user"), turn("assistant", weight=0), turn("user"), turn("assistant")]
    dataset = read_dataset(written(tmp_path, chat(*messages)))
    (row,) = dataset.rows
    assert isinstance(row, ConversationRow)
    assert list(row.messages) == messages
    assert dataset.schema is Schema.MESSAGES


def test_duplicates_are_counted(tmp_path: Path) -> None:
    other = line({"prompt": "a", "completion": "c"})
    assert read_dataset(written(tmp_path, line(GOOD) * 3 + other)).duplicate_rows == 2


def test_control_characters_are_kept(tmp_path: Path) -> None:
    (row,) = read_dataset(written(tmp_path, line({"prompt": "\x00\x1b\u2028", "completion": "\t"}))).rows
    assert isinstance(row, PromptRow)
    assert row.prompt == "\x00\x1b\u2028"
