"""ShareGPT rows: `conversations` of `from` and `value`."""

from __future__ import annotations

import json
from typing import Any

from services.trainer.dataset.faults import LineError
from services.trainer.dataset.messages import arguments_of, bad, check_turns, checked_tools

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = "function_call"
_KEYS = frozenset({"from", "value", "weight"})


def sharegpt_messages(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the turns of a row; raise `LineError` (`bad_messages`) for the first that is wrong."""
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise bad("conversations must be a list that is not empty", "conversations")
    messages = []
    system = value.get("system")
    if system is not None and system != "":
        messages.append({"role": "system", "content": _text(system, "system")})
    for index, turn in enumerate(turns):
        message = _message(turn, f"conversations[{index}]")
        if message["role"] == "system" and messages:
            raise bad("a system turn must come first, and once", f"conversations[{index}].from")
        messages.append(message)
    check_turns(messages)
    return tuple(messages)


def sharegpt_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row: a list, or the text of one, of functions in either usual shape."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value else []
        except (ValueError, RecursionError) as error:
            raise LineError("bad_tools", "tools is not JSON; write a list", field="tools") from error
    if isinstance(value, list):
        value = [
            {"type": "function", "function": tool}
            if isinstance(tool, dict) and "function" not in tool
            else tool
            for tool in value
        ]
    return checked_tools(value)


def _message(turn: Any, path: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise bad("a turn must be an object with from and value", path)
    for key in turn:
        if key not in _KEYS:
            raise bad(f"key {key[:40]!r} is not supported; remove it", f"{path}.{key[:40]}")
    speaker = turn.get("from")
    if speaker == _CALL:
        return {"role": "assistant", "content": "", "tool_calls": _calls(turn.get("value"), f"{path}.value")}
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise bad(f"from must be one of {', '.join([*_ROLES, _CALL])}", f"{path}.from")
    message: dict[str, Any] = {"role": role, "content": _text(turn.get("value"), f"{path}.value")}
    weight = turn.get("weight", 1)
    if "weight" in turn:
        if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise bad("weight must be 0 or 1, and only the assistant's turns have one", f"{path}.weight")
        message["weight"] = weight
    return message


def _calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls in a `function_call` turn: one object or a list of them, as JSON text."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise bad("a function_call must be JSON with name and arguments", field) from error
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
            raise bad("a function_call must be JSON with name and arguments", field)
        calls.append(
            {"id": "", "name": call["name"], "arguments": arguments_of(call.get("arguments"), field)}
        )
    if not calls:
        raise bad("a function_call must be JSON with name and arguments", field)
    return calls


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise bad(f"{field.rpartition('.')[2]} must be text that is not empty", field)
    return value
