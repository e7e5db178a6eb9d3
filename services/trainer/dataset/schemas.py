"""The row schemas: which one a row means to follow, and the row in it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from services.trainer.dataset.alpaca import instruction_row
from services.trainer.dataset.faults import LineError
from services.trainer.dataset.messages import checked_messages, checked_tools
from services.trainer.dataset.rows import ConversationRow, PromptRow, Row, TextRow
from services.trainer.dataset.sharegpt import sharegpt_messages, sharegpt_tools

# What data sets keep beside a row for people and for scoring; it has no part in the training text.
ANNOTATIONS = frozenset(
    {
        "id",
        "metadata",
        "references",
        "answer",
        "subject",
        "level",
        "ending",
        "tests",
        "test_setup",
        "entry_point",
    }
)


class Schema(StrEnum):
    """The shape that all rows of a file have."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    TEXT = "text"


_FIELDS = {
    # Whether tools may be called at once is a matter of serving; the rows show what is to be learnt.
    Schema.MESSAGES: frozenset({"messages", "tools", "parallel_tool_calls"}),
    Schema.SHAREGPT: frozenset({"conversations", "system", "tools"}),
    Schema.PROMPT_COMPLETION: frozenset({"prompt", "completion"}),
    Schema.ALPACA: frozenset({"instruction", "input", "output", "system", "history"}),
    Schema.TEXT: frozenset({"text"}),
}
# A row follows the first schema of which it has one of these fields.
_MARKS = {
    Schema.MESSAGES: ("messages",),
    Schema.SHAREGPT: ("conversations",),
    Schema.PROMPT_COMPLETION: ("prompt", "completion"),
    Schema.ALPACA: ("instruction", "output"),
    Schema.TEXT: ("text",),
}
# What people have under other names, and what to do about it.
_RENAMED = {
    "response": "completion",
    "question": "prompt",
    "query": "prompt",
    "conversation": "conversations",
    "dialogue": "messages",
    "content": "text",
}


def schema_of(value: dict[str, Any]) -> Schema:
    """Return which schema a row means to follow; raise `LineError` (`unknown_schema`) where none shows."""
    for schema, marks in _MARKS.items():
        if any(mark in value for mark in marks):
            return schema
    for name, ours in _RENAMED.items():
        if name in value:
            raise LineError("unknown_schema", f"{name!r} is not a field here; call it {ours!r}", field=name)
    raise LineError(
        "unknown_schema",
        'the row needs "messages"; "prompt" and "completion"; "conversations"; "instruction" and "output";'
        ' or "text"',
    )


def parse_row(value: dict[str, Any], schema: Schema, line: int) -> Row:
    """Return the row in `value`; raise `LineError` for the first field that is wrong."""
    for key in value:
        if key not in _FIELDS[schema] and key not in ANNOTATIONS:
            raise LineError("unknown_field", f"field {key[:40]!r} has no effect; remove it", field=key[:40])
    if schema is Schema.MESSAGES:
        tools = checked_tools(value["tools"]) if value.get("tools") is not None else ()
        return ConversationRow(line, checked_messages(value["messages"]), tools)
    if schema is Schema.SHAREGPT:
        tools = sharegpt_tools(value["tools"]) if value.get("tools") is not None else ()
        return ConversationRow(line, sharegpt_messages(value), tools)
    if schema is Schema.ALPACA:
        return instruction_row(value, line)
    if schema is Schema.TEXT:
        return TextRow(line, _text(value, "text"))
    return PromptRow(line, _text(value, "prompt"), _text(value, "completion"))


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise LineError(f"bad_{name}", f"{name} must be text that is not empty", field=name)
    return text
