"""Where in a line of JSON a field stands, to point at what is wrong with it."""

from __future__ import annotations

import json
import re

_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def column_of(text: str, field: str) -> int:
    """Return the 1-based column of `field`, or of the innermost part of its path that the object has.

    Args:
        text: a JSON object that parses.
        field: a path such as `messages[2].role`.
    """
    position = _after_blanks(text, 0)
    for match in _STEP.finditer(field):
        found = _element(text, position, int(match[1])) if match[1] else _member(text, position, match[2])
        if found is None:
            break
        position = found
    return position + 1


def _member(text: str, position: int, name: str) -> int | None:
    """Return where the value of key `name` begins in the object at `position`."""
    if text[position] != "{":
        return None
    position = _after_blanks(text, position + 1)
    while text[position] != "}":
        key, position = _DECODER.raw_decode(text, position)
        position = _after_blanks(text, _after_blanks(text, position) + 1)
        if key == name:
            return position
        position = _past_value(text, position)
    return None


def _element(text: str, position: int, index: int) -> int | None:
    """Return where element `index` begins in the list at `position`."""
    if text[position] != "[":
        return None
    position = _after_blanks(text, position + 1)
    while text[position] != "]":
        if index == 0:
            return position
        index -= 1
        position = _past_value(text, position)
    return None


def _past_value(text: str, position: int) -> int:
    """Return where the next key or element begins, or the closing bracket stands."""
    _, position = _DECODER.raw_decode(text, position)
    position = _after_blanks(text, position)
    return _after_blanks(text, position + 1) if text[position] == "," else position


def _after_blanks(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    assert match is not None, "the pattern matches nothing too"
    return match.end()
