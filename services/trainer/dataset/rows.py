"""The two row schemas, checked field by field."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from services.trainer.dataset.faults import LineError

ROLES = ("system", "user", "assistant", "tool")
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
_MESSAGE_KEYS = frozenset({"role", "content", "weight"})


class Schema(StrEnum):
    """The shape that all rows of a file have."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A text and what is to follow it."""

    line: int
    prompt: str
    completion: str

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content; equal rows have equal digests."""
        return _digest(["p", self.prompt, self.completion])

    @property
    def prompt_digest(self) -> bytes:
        """SHA-256 of what the model is given."""
        return _digest(["p", self.prompt])


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A conversation that ends with the assistant; its messages have `role`, `content`, perhaps `weight`."""

    line: int
    messages: tuple[dict[str, Any], ...]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the content; equal rows have equal digests."""
        return _digest(["m", self.messages])

    @property
    def prompt_digest(self) -> bytes:
        """SHA-256 of what the model is given before its last turn."""
        return _digest(["m", self.messages[:-1]])


Row = PromptRow | ConversationRow


def schema_of(value: dict[str, Any]) -> Schema:
    """Return which schema a row means to follow; raise `LineError` (`unknown_schema`) where none shows."""
    if "messages" in value:
        return Schema.MESSAGES
    if "prompt" in value or "completion" in value:
        return Schema.PROMPT_COMPLETION
    raise LineError("unknown_schema", 'the row needs "messages", or "prompt" and "completion"')


def parse_row(value: dict[str, Any], schema: Schema, line: int) -> Row:
    """Return the row in `value`; raise `LineError` for the first field that is wrong."""
    allowed = {"messages"} if schema is Schema.MESSAGES else {"prompt", "completion"}
    for key in value:
        if key not in allowed and key not in ANNOTATIONS:
            raise LineError("unknown_field", f"field {key[:40]!r} has no effect; remove it", field=key[:40])
    if schema is Schema.MESSAGES:
        return ConversationRow(line, _messages(value["messages"]))
    return PromptRow(line, _text(value, "prompt"), _text(value, "completion"))


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise LineError(f"bad_{name}", f"{name} must be text that is not empty", field=name)
    return text


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _bad("messages must be a list that is not empty", "messages")
    for index, message in enumerate(value):
        _check_message(message, f"messages[{index}]", is_first=index == 0)
    first = value[1 if value[0]["role"] == "system" else 0 :]
    if not first or first[0]["role"] != "user":
        raise _bad("the first turn must be the user's", "messages[0].role")
    if value[-1]["role"] != "assistant":
        raise _bad("the last turn must be the assistant's: it is what is learnt", "messages")
    if not any(message["role"] == "assistant" and message.get("weight", 1) == 1 for message in value):
        raise _bad("every assistant turn has weight 0, so nothing would be learnt", "messages")
    return tuple(value)


def _check_message(message: Any, path: str, *, is_first: bool) -> None:
    if not isinstance(message, dict):
        raise _bad("a message must be an object with role and content", path)
    for key in message:
        if key not in _MESSAGE_KEYS:
            raise _bad(f"key {key[:40]!r} is not supported; remove it", f"{path}.{key[:40]}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _bad(f"role must be one of {', '.join(ROLES)}", f"{path}.role")
    if role == "system" and not is_first:
        raise _bad("a system message must come first", f"{path}.role")
    if not isinstance(content, str) or not content:
        raise _bad("content must be text that is not empty", f"{path}.content")
    if "weight" in message:
        weight = message["weight"]
        if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise _bad("weight must be 0 or 1, and only assistant turns have one", f"{path}.weight")


def _bad(text: str, field: str) -> LineError:
    return LineError("bad_messages", text, field=field)


def _digest(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode("ascii")).digest()
