"""Tools: what a chat request offers, how a call is forced, and how one is read out of an answer.

Base models write calls in many ways. Read here: a JSON object with `name` and `arguments` (or `parameters`),
alone or between `<tool_call>` tags. Where a call is required, the answer is constrained to such an object by
a JSON schema, so that it always is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import StringConstraints, field_validator

from services.common.ids import new_id
from services.gateway.json_body import Body

MAX_TOOLS = 128
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# Anything that may be the beginning of a call; other text is passed on at once.
_BEGINNINGS = ("{", _OPEN)

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Body):
    """A function that the model may call. `strict` arguments are what the schema says in any case."""

    name: ToolName
    description: Annotated[str, StringConstraints(max_length=8192)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """One tool; functions are the only kind."""

    unsupported: ClassVar[frozenset[str]] = frozenset({"custom"})

    type: Literal["function"]
    function: Function

    def as_json(self) -> str:
        """Return the tool as chat templates take it."""
        return self.model_dump_json(exclude_none=True)


class NamedFunction(Body):
    """Which function must be called."""

    name: ToolName


class NamedTool(Body):
    """`tool_choice` of one tool."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Body):
    """A call in an earlier turn."""

    name: ToolName
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, value: str) -> str:
        try:
            is_object = isinstance(json.loads(value), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ValueError("arguments must be a JSON object, as text")
        return value


class PastCall(Body):
    """A tool call of an assistant's earlier turn."""

    id: Annotated[str, StringConstraints(max_length=64)]
    type: Literal["function"]
    function: CalledFunction


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the model makes; `arguments` is a JSON object as text."""

    name: str
    arguments: str

    def as_object(self) -> dict[str, Any]:
        """Return OpenAI's tool call, with an id of its own."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": new_id("call"), "type": "function", "function": function}


def call_schema(tools: Sequence[Tool]) -> str:
    """Return the JSON schema of a call of one of `tools`."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def read_call(text: str, tools: Sequence[Tool]) -> Call | None:
    """Return the call that an answer is; None where it is text."""
    body = text.strip()
    if body.startswith(_OPEN):
        body = body.removeprefix(_OPEN).partition(_CLOSE)[0].strip()
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in {tool.function.name for tool in tools}:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    if not isinstance(arguments, dict):
        return None
    return Call(str(value["name"]), json.dumps(arguments, ensure_ascii=False))


class HeldText:
    """The text of a choice that may turn out to be a call: held back for as long as it may."""

    def __init__(self) -> None:
        self._text = ""
        self._is_text = False

    def push(self, text: str) -> str:
        """Take more of the answer, and return what is certain to be text."""
        if self._is_text:
            return text
        self._text += text
        start = self._text.lstrip()
        if not start or any(
            start.startswith(beginning) or beginning.startswith(start) for beginning in _BEGINNINGS
        ):
            return ""
        self._is_text = True
        return self._text

    def end(self, tools: Sequence[Tool]) -> str | Call:
        """Return the call that the held text is, or else the text that was held."""
        if self._is_text:
            return ""
        return read_call(self._text, tools) or self._text
