"""The lines of a training file as JSON objects, with bounded memory per line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from services.trainer.dataset.faults import LineError

LINE_LIMIT_BYTES = 8 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = (b"\xff\xfe", b"\xfe\xff")
# Whole numbers beyond 2**53 are not the same number in every JSON reader.
_MAX_WHOLE_NUMBER = 2**53
_MAX_DEPTH = 32
# Whole strings first, so that what stands inside them is passed over.
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|[{}\[\]]', re.DOTALL)
_CONSTANT = re.compile(r'"(?:[^"\\]++|\\.?)*+"?|-?Infinity|NaN', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank.

    Attributes:
        number: from 1.
        offset_bytes: where it begins in the file.
        text: as it stands, without its end; empty where it could not be read.
        value: the object in it, or what is wrong.
    """

    number: int
    offset_bytes: int
    text: str
    value: dict[str, Any] | LineError


class LineReader:
    """Reads a file once: its lines and its digest. Holds one line at a time."""

    def __init__(self, path: Path, *, line_limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._path = path
        self._line_limit_bytes = line_limit_bytes
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the bytes; final once `lines` is used up."""
        return "sha256:" + self._hash.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Yield every line that is not blank.

        Past a line longer than the limit the file is still read to its end, in pieces.
        """
        for number, offset, raw, too_long in self._raw_lines():
            if too_long:
                limit = f"{self._line_limit_bytes:,} bytes"
                fault = LineError("line_too_large", f"the line is longer than {limit}; shorten it")
                yield Line(number, offset, "", fault)
            elif line := parse_line(raw, number, offset):
                yield line

    def _raw_lines(self) -> Iterator[tuple[int, int, bytes, bool]]:
        with self._path.open("rb") as file:
            number = offset = 0
            while piece := file.readline(self._line_limit_bytes + 2):
                number += 1
                start = offset
                offset += len(piece)
                self._hash.update(piece)
                too_long = len(piece.rstrip(b"\r\n")) > self._line_limit_bytes
                yield number, start, piece, too_long
                while not piece.endswith(b"\n"):
                    piece = file.readline(self._line_limit_bytes)
                    if not piece:
                        break
                    offset += len(piece)
                    self._hash.update(piece)


def parse_line(raw: bytes, number: int, offset_bytes: int) -> Line | None:
    """Return the line in `raw`, or None where it is blank."""
    body = raw.removeprefix(_BOM) if number == 1 else raw
    if not body.strip():
        return None
    start = offset_bytes + len(raw) - len(body)
    if body.startswith(_OTHER_BOMS):
        fault = LineError("not_utf8", f"UTF-16 at byte {start}; save the file as UTF-8")
        return Line(number, offset_bytes, "", fault)
    try:
        text = body.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        fault = LineError("not_utf8", f"not UTF-8 at byte {start + error.start}; save the file as UTF-8")
        return Line(number, offset_bytes, "", fault)
    return Line(number, offset_bytes, text, _parse(text))


def _parse(text: str) -> dict[str, Any] | LineError:
    try:
        _check_depth(text)
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_int=_whole_number
        )
    except json.JSONDecodeError as error:
        remedy = "one JSON object per line"
        return LineError("bad_json_line", f"not JSON ({error.msg}); {remedy}", column=error.colno)
    except LineError as fault:
        if fault.reason == "bad_number" and fault.column is None:
            fault.column = _constant_column(text)
        return fault
    if not isinstance(value, dict):
        return LineError("bad_json_line", "the line must be a JSON object", column=1)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return LineError("lone_surrogate", "a string holds half of a surrogate pair; remove it")
    return value


def _check_depth(text: str) -> None:
    if text.count("{") + text.count("[") <= _MAX_DEPTH:
        return
    depth = 0
    for match in _STRUCTURE.finditer(text):
        mark = match.group()[0]
        if mark in "{[":
            depth += 1
            if depth > _MAX_DEPTH:
                text = f"nested deeper than {_MAX_DEPTH} levels; flatten it"
                raise LineError("bad_json_line", text, column=match.start() + 1)
        elif mark in "}]":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise LineError("duplicate_key", f"key {key[:40]!r} is given twice; keep one")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise LineError("bad_number", f"{name} is not a JSON number; use null or text")


def _whole_number(digits: str) -> int:
    # Digits are counted first: turning a million of them into a number takes seconds.
    if len(digits) > 17 or abs(int(digits)) > _MAX_WHOLE_NUMBER:
        raise LineError("bad_number", "whole numbers must lie within 2^53; write longer ones as text")
    return int(digits)


def _constant_column(text: str) -> int | None:
    for match in _CONSTANT.finditer(text):
        if not match.group().startswith('"'):
            return match.start() + 1
    return None
