"""Training files: what is accepted, and that every bad line is named.

The numbers in the test ids are those of the fault catalogue.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.trainer.dataset import ConversationRow, DatasetReader, PromptRow, Row, Schema
from services.trainer.dataset.columns import column_of

GOOD = {"prompt": "a", "completion": "b"}
ALPACA = {"instruction": "a", "output": "b"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def chat(*messages: dict[str, object]) -> bytes:
    return line({"messages": list(messages)})


def turn(role: str, content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def shared(*turns: tuple[str, str]) -> bytes:
    return line({"conversations": [{"from": speaker, "value": value} for speaker, value in turns]})


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    return path


def read(tmp_path: Path, data: bytes, **options: int) -> tuple[Schema, list[Row]]:
    reader = DatasetReader(written(tmp_path, data), **options)  # type: ignore[arg-type]
    rows = [row for _, row in reader.rows()]
    reader.finish()
    assert reader.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    return reader.schema, rows


def refusal(tmp_path: Path, data: bytes, **options: int) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path, data, **options)
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
    pytest.param(line({"texts": "a"}), "unknown_schema", 1, None, id="no schema"),
    pytest.param(line({"question": "a", "x": 1}), "unknown_schema", 1, 14, id="other name"),
    pytest.param(line({"text": ""}), "bad_text", 1, 10, id="empty text"),
    pytest.param(line({"text": "a", "label": 1}), "unknown_field", 1, 24, id="text with label"),
    pytest.param(line({"text": "a"}) + line(GOOD), "mixed_schema", 2, None, id="49 text and prompt"),
    pytest.param(line({"instruction": "a"}), "bad_output", 1, None, id="Alpaca without output"),
    pytest.param(line(ALPACA | {"input": 1}), "bad_input", 1, None, id="Alpaca number"),
    pytest.param(line(ALPACA | {"history": [["a"]]}), "bad_messages", 1, 49, id="Alpaca history"),
    pytest.param(shared(("human", "a")), "bad_messages", 1, None, id="50 ShareGPT without answer"),
    pytest.param(shared(("gpt", "a"), ("human", "b")), "bad_messages", 1, None, id="50 ShareGPT order"),
    pytest.param(shared(("human", "a"), ("alien", "b")), "bad_messages", 1, 62, id="50 ShareGPT role"),
    pytest.param(shared(("human", "a"), ("gpt", "")), "bad_messages", 1, None, id="50 ShareGPT empty"),
    pytest.param(
        shared(("human", "a"), ("function_call", "f(x)")), "bad_messages", 1, None, id="ShareGPT call"
    ),
    pytest.param(line({"conversations": {}}), "bad_messages", 1, 19, id="ShareGPT no list"),
    pytest.param(line(CHAT | {"tools": [{"name": "f"}]}), "bad_tools", 1, None, id="tool without function"),
    pytest.param(
        chat(turn("user"), turn("tool", "x"), turn("assistant")), "bad_messages", 1, None, id="unasked tool"
    ),
    pytest.param(
        chat(
            turn("user"), turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "["}}])
        ),
        "bad_messages",
        1,
        None,
        id="arguments",
    ),
    pytest.param(
        chat(turn("user", [{"type": "image_url"}]), turn("assistant")), "bad_messages", 1, 43, id="image"
    ),
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


def test_row_46_every_bad_line_is_named_up_to_twenty(tmp_path: Path) -> None:
    data = b"".join(b"broken\n" if i % 2 else line(GOOD) for i in range(60))
    error = refusal(tmp_path, data)
    assert [violation.field for violation in error.violations] == [
        f"training_file.lines[{number}]" for number in range(2, 42, 2)
    ]
    assert error.metadata["fault_count"] == "30"
    assert "10 more" in error.message


def test_fault_names_field_column_and_remedy(tmp_path: Path) -> None:
    data = (
        b'{ "id": "\\"messages\\"", "messages" : [{"role": "user", "content": "q"},'
        b' {"content": "", "role": "robot"}]}\n'
    )
    violation = refusal(tmp_path, data).violations[0]
    assert violation.field == "training_file.lines[1].messages[1].role"
    column = data.decode().index('"robot"') + 1
    assert violation.description.startswith(f"line 1, column {column}: role must be one of system, user,")


def test_fault_names_the_field_inside_the_row(tmp_path: Path) -> None:
    violation = refusal(tmp_path, chat(turn("user"), turn("robot"), turn("assistant"))).violations[0]
    assert violation.field == "training_file.lines[1].messages[1].role"
    assert "system, user, assistant, tool" in violation.description


def test_row_54_long_line_is_refused_and_reading_goes_on(tmp_path: Path) -> None:
    long_line = line({"prompt": "x" * 5000, "completion": "y"})
    error = refusal(tmp_path, line(GOOD) + long_line + b"broken\n", line_limit_bytes=1000)
    assert [v.reason for v in error.violations] == ["line_too_large", "bad_json_line"]
    assert [v.field for v in error.violations] == ["training_file.lines[2]", "training_file.lines[3]"]


def test_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    row = line(GOOD)
    assert len(read(tmp_path, row, line_limit_bytes=len(row) - 1)[1]) == 1


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
def test_row_47_harmless_oddities_are_accepted(tmp_path: Path, data: bytes) -> None:
    schema, (row,) = read(tmp_path, data)
    assert schema is Schema.PROMPT_COMPLETION
    assert isinstance(row, PromptRow)
    assert (row.prompt, row.completion) == ("a", "b")


def test_conversation_keeps_its_messages(tmp_path: Path) -> None:
    messages = [turn("system"), turn("user"), turn("assistant", weight=0), turn("user"), turn("assistant")]
    schema, (row,) = read(tmp_path, chat(*messages))
    assert isinstance(row, ConversationRow)
    assert list(row.messages) == messages
    assert schema is Schema.MESSAGES


def test_row_55_control_characters_are_kept(tmp_path: Path) -> None:
    _, (row,) = read(tmp_path, line({"prompt": "\x00\x1b\u2028", "completion": "\t"}))
    assert isinstance(row, PromptRow)
    assert row.prompt == "\x00\x1b\u2028"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_tool_calls_are_read_with_their_arguments(tmp_path: Path) -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "x"}'}}
    row = {
        "messages": [
            turn("developer", "be short"),
            turn("user", [{"type": "text", "text": "ra"}, {"type": "text", "text": "in?"}]),
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            turn("assistant", "no"),
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    }
    _, (read_row,) = read(tmp_path, line(row))
    assert read_row == ConversationRow(
        1,
        (
            turn("system", "be short"),
            turn("user", "rain?"),
            turn("assistant", "", tool_calls=[{"id": "c1", "name": "weather", "arguments": {"place": "x"}}]),
            turn("tool", "", tool_call_id="c1"),
            turn("assistant", "no"),
        ),
        (WEATHER,),
    )


def test_sharegpt_is_read_as_a_conversation(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"place": "x"}}'},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "no", "weight": 1},
        ],
        "system": "be short",
        "tools": json.dumps([WEATHER["function"]]),
    }
    schema, (read_row,) = read(tmp_path, line(row))
    assert schema is Schema.SHAREGPT
    assert isinstance(read_row, ConversationRow)
    assert [message["role"] for message in read_row.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert read_row.messages[2]["tool_calls"] == [{"id": "", "name": "weather", "arguments": {"place": "x"}}]
    assert read_row.tools == (WEATHER,)


def test_row_49_first_line_of_each_kind_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, line(CHAT) + line(GOOD) + line(CHAT) + line({"text": "t"}) + line(GOOD))
    assert [violation.description for violation in error.violations] == [
        "line 2: the row is prompt_completion (first in line 2); use messages as in line 1",
        "line 4: the row is text (first in line 4); use messages as in line 1",
        "line 5: the row is prompt_completion (first in line 2); use messages as in line 1",
    ]


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
        ),
        max_leaves=12,
    ),
    indent=st.sampled_from([None, 1]),
)
def test_columns_point_at_the_value(value: object, indent: int | None) -> None:
    text = json.dumps({"before": [1, {"a": "}"}], "here": value, "after": 2}, indent=indent).replace(
        "\n", " "
    )
    column = column_of(text, "here")
    assert json.JSONDecoder().raw_decode(text, column - 1)[0] == value
    assert column_of(text, "nowhere.at[3].all") == 1
