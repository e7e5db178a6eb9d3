"""Alpaca rows: `instruction`, `input` and `output`."""

from __future__ import annotations

from typing import Any

from services.trainer.dataset.faults import LineError
from services.trainer.dataset.messages import bad
from services.trainer.dataset.rows import InstructionRow


def instruction_row(value: dict[str, Any], line: int) -> InstructionRow:
    """Return the row; raise `LineError` for the first field that is wrong."""
    instruction = _text(value, "instruction")
    given = value.get("input") or ""
    if not isinstance(given, str):
        raise LineError("bad_input", "input must be text; leave it out where there is none", field="input")
    messages = []
    system = value.get("system")
    if system is not None and system != "":
        messages.append({"role": "system", "content": _text(value, "system")})
    messages += _history(value.get("history"))
    asked = f"{instruction}\n\n{given}" if given else instruction
    messages.append({"role": "user", "content": asked})
    messages.append({"role": "assistant", "content": _text(value, "output")})
    return InstructionRow(line, tuple(messages), instruction, given)


def _history(value: Any) -> list[dict[str, Any]]:
    """Return the turns before the instruction, which are given and not learnt."""
    messages: list[dict[str, Any]] = []
    if value is None:
        return messages
    if not isinstance(value, list):
        raise bad("history must be a list of [instruction, response] pairs", "history")
    for index, pair in enumerate(value):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text for text in pair):
            raise bad("a pair must be [instruction, response], neither empty", f"history[{index}]")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1], "weight": 0})
    return messages


def _text(value: dict[str, Any], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise LineError(f"bad_{name}", f"{name} must be text that is not empty", field=name)
    return text
