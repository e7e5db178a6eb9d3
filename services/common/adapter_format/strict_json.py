"""JSON from strangers: one object, no duplicate keys, bounded depth, no NaN, no lone surrogates."""

from __future__ import annotations

import enum
import json
import re
from typing import Any, NoReturn

# Whole strings, so that marks inside them are not counted; never looks at a character twice.
_STRING = re.compile(r'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_PAIR = re.compile(r"\[\]|\{\}")
_NOT_BRACKETS = re.compile(r"[^{}\[\]]+")


class JsonFault(enum.Enum):
    """What is wrong with a document."""

    NOT_UTF8 = "not_utf8"
    BAD_JSON = "bad_json"
    DUPLICATE_KEY = "duplicate_key"


class StrictJsonError(Exception):
    """A document was refused.

    Attributes:
        fault: what is wrong.
        key: the repeated key, for `DUPLICATE_KEY`.
        top_level: whether the repeated key stands in the outermost object.
    """

    def __init__(self, fault: JsonFault, message: str, *, key: str = "", top_level: bool = False) -> None:
        super().__init__(message)
        self.fault = fault
        self.key = key
        self.top_level = top_level


class _Objects:
    """Makes the objects of one document, inner ones first, and remembers keys given twice."""

    def __init__(self) -> None:
        self.first_repeated: str | None = None
        self.repeated_in_latest: str | None = None

    def make(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Return the object of `pairs`."""
        result = dict(pairs)
        self.repeated_in_latest = None if len(result) == len(pairs) else _repeated(pairs)
        if self.first_repeated is None:
            self.first_repeated = self.repeated_in_latest
        return result


def parse_object(data: bytes, *, max_depth: int, max_values: int | None = None) -> dict[str, Any]:
    """Return the JSON object in `data`; its time is linear in `len(data)`.

    With `max_values`, a document of more values or strings is refused before any of them is made: a great
    many small values take far more memory than their text.

    Raises:
        StrictJsonError: not UTF-8, not JSON, not an object, deeper than `max_depth`, larger than
            `max_values`, or a key is given twice.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(JsonFault.NOT_UTF8, f"not UTF-8 at byte {error.start}") from error
    # Escaped quotes count too: the limit is far above what an honest document of that size has.
    if max_values is not None and text.count('"') > 2 * max_values:
        raise StrictJsonError(JsonFault.BAD_JSON, f"it has more than {max_values} strings")
    _check_structure(_STRING.sub("", text), max_depth, max_values)
    objects = _Objects()
    try:
        parsed = json.loads(text, object_pairs_hook=objects.make, parse_constant=_refuse_constant)
    except ValueError as error:
        raise StrictJsonError(JsonFault.BAD_JSON, f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise StrictJsonError(JsonFault.BAD_JSON, "not a JSON object")
    _check_repeated(objects)
    _check_surrogates(text, parsed)
    return parsed


def canonical_json(value: object) -> bytes:
    """Return the one spelling of `value` that digests are taken over: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _check_structure(marks: str, max_depth: int, max_values: int | None) -> None:
    # Every value but the first of its container follows a comma.
    num_values = marks.count(",") + marks.count("{") + marks.count("[") + 1
    if max_values is not None and num_values > max_values:
        raise StrictJsonError(JsonFault.BAD_JSON, f"it has more than {max_values} values")
    brackets = _NOT_BRACKETS.sub("", marks)
    for _ in range(max_depth):
        brackets = _PAIR.sub("", brackets)
    # A pair that is left lies around deeper ones; what was never closed, the parser refuses by itself.
    if _PAIR.search(brackets) or brackets.count("{") + brackets.count("[") > max_depth:
        raise StrictJsonError(JsonFault.BAD_JSON, f"nested deeper than {max_depth} levels")


def _repeated(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is given twice")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_repeated(objects: _Objects) -> None:
    # The outermost object is made last.
    outermost = objects.repeated_in_latest
    key = objects.first_repeated if outermost is None else outermost
    if key is not None:
        message = f"key {key[:80]!r} is given twice"
        raise StrictJsonError(JsonFault.DUPLICATE_KEY, message, key=key, top_level=outermost is not None)


def _check_surrogates(text: str, parsed: object) -> None:
    if "\\u" not in text:
        return
    try:
        json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise StrictJsonError(JsonFault.BAD_JSON, "a string holds half of a surrogate pair") from error
