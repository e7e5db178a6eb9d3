"""Conversations in OpenAI's shape, checked field by field."""

from __future__ import annotations

import json
from typing import Any

from services.common.chat_template import MAX_MESSAGES
from services.trainer.dataset.faults import LineError

ROLES = ("system", "user", "assistant", "tool")
MAX_TOOLS = 128
_KEYS = frozenset({"role", "content", "weight", "name", "tool_calls", "tool_call_id"})
# OpenAI's newer word for the same turn.
_SAME_ROLE = {"developer": "system"}
_REMEDIES = {
    "function_call": "write it as tool_calls",
    "refusal": "write it as content",
    "audio": "only text can be learnt",
}


def checked_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the turns of a row, normalised; raise `LineError` (`bad_messages`) for the first bad one."""
    if not isinstance(value, list) or not value:
        raise bad("messages must be a list that is not empty", "messages")
    if len(value) > MAX_MESSAGES:
        raise bad(f"{len(value)} messages, at most {MAX_MESSAGES}; split the row", "messages")
    messages = [_message(item, f"messages[{index}]", is_first=index == 0) for index, item in enumerate(value)]
    check_turns(messages)
    return tuple(messages)


def check_turns(messages: list[dict[str, Any]]) -> None:
    """Raise `LineError` (`bad_messages`) unless the turns begin with the user and end with the assistant."""
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) <= first or messages[first]["role"] != "user":
        raise bad("the first turn must be the user's", f"messages[{min(first, len(messages) - 1)}].role")
    if messages[-1]["role"] != "assistant":
        raise bad("the last turn must be the assistant's: it is what is learnt", "messages")
    if not any(message["role"] == "assistant" and message.get("weight", 1) == 1 for message in messages):
        raise bad("every assistant turn has weight 0, so nothing would be learnt", "messages")
    _check_calls_are_answered(messages)


def checked_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row; raise `LineError` (`bad_tools`) for the first that is wrong."""
    if not isinstance(value, list):
        raise LineError("bad_tools", "tools must be a list of objects", field="tools")
    if len(value) > MAX_TOOLS:
        raise LineError(
            "bad_tools", f"{len(value)} tools, at most {MAX_TOOLS}; leave some out", field="tools"
        )
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            text = 'a tool must be {"type": "function", "function": {...}}'
            raise LineError("bad_tools", text, field=f"tools[{index}]")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise LineError("bad_tools", "a function needs a name", field=f"tools[{index}].function.name")
    return tuple(value)


def bad(text: str, field: str) -> LineError:
    """Return the fault of a conversation."""
    return LineError("bad_messages", text, field=field)


def _message(value: Any, path: str, *, is_first: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad("a message must be an object with role and content", path)
    for key in value:
        if key not in _KEYS:
            remedy = _REMEDIES.get(key, "remove it")
            raise bad(f"key {key[:40]!r} is not supported; {remedy}", f"{path}.{key[:40]}")
    role = value.get("role")
    role = _SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise bad(f"role must be one of {', '.join(ROLES)}", f"{path}.role")
    if role == "system" and not is_first:
        raise bad("a system message must come first", f"{path}.role")
    message: dict[str, Any] = {"role": role}
    calls = _tool_calls(value, role, path)
    message["content"] = _content(value.get("content"), path, may_be_empty=bool(calls) or role == "tool")
    if calls:
        message["tool_calls"] = calls
    for name, owner in (("name", None), ("tool_call_id", "tool")):
        if value.get(name) is None:
            continue
        if not isinstance(value[name], str) or not value[name] or owner not in (None, role):
            whose = f", and only {owner} turns have one" if owner else ""
            raise bad(f"{name} must be text that is not empty{whose}", f"{path}.{name}")
        message[name] = value[name]
    if "weight" in value:
        weight = value["weight"]
        if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise bad("weight must be 0 or 1, and only assistant turns have one", f"{path}.weight")
        message["weight"] = weight
    return message


def _content(value: Any, path: str, *, may_be_empty: bool) -> str:
    if isinstance(value, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in value
        ]
        if not all(isinstance(part, str) for part in parts):
            text = 'a content part must be {"type": "text", "text": ...}; only text can be learnt'
            raise bad(text, f"{path}.content")
        value = "".join(str(part) for part in parts)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str) or (not value and not may_be_empty):
        raise bad("content must be text that is not empty", f"{path}.content")
    return value


def _tool_calls(message: dict[str, Any], role: str, path: str) -> list[dict[str, Any]]:
    value = message.get("tool_calls")
    if value is None:
        return []
    field = f"{path}.tool_calls"
    if role != "assistant":
        raise bad("only assistant turns call tools", field)
    if not isinstance(value, list) or not value:
        raise bad("tool_calls must be a list that is not empty", field)
    return [_tool_call(call, f"{field}[{index}]") for index, call in enumerate(value)]


def _tool_call(value: Any, path: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type", "function") != "function":
        raise bad('a call must be {"type": "function", "function": {...}}', path)
    name, arguments, call_id = function.get("name"), function.get("arguments"), value.get("id", "")
    if not isinstance(name, str) or not name:
        raise bad("the called function needs a name", f"{path}.function.name")
    if not isinstance(call_id, str):
        raise bad("id must be text", f"{path}.id")
    return {"id": call_id, "name": name, "arguments": arguments_of(arguments, f"{path}.function.arguments")}


def arguments_of(value: Any, field: str) -> dict[str, Any]:
    """Return the arguments of a call: an object, or the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise bad("arguments are not JSON; write an object", field) from error
    if not isinstance(value, dict):
        raise bad("arguments must be a JSON object, or the text of one", field)
    return value


def _check_calls_are_answered(messages: list[dict[str, Any]]) -> None:
    """A tool's turn answers the assistant's call before it."""
    called = False
    for index, message in enumerate(messages):
        if message["role"] == "tool" and not called:
            raise bad("a tool turn must follow an assistant turn with tool_calls", f"messages[{index}].role")
        called = bool(message.get("tool_calls")) or (called and message["role"] == "tool")
