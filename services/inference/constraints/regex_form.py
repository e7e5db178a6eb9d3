"""The form of a regular expression, as far as its cost depends on it; the compiler tells if it is valid."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MAX_DEPTH = 64
_COUNT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
_GROUP_FLAGS = re.compile(r"\?(?:P?<[A-Za-z_]\w*>|[a-zA-Z-]*:)")


class RegexFormError(Exception):
    """What is wrong with the form; `limit` is what is allowed."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an expression: how many repeated parts it makes, and whether it is one endless repetition."""

    repeats: int
    is_endless: bool


def check_form(pattern: str, *, max_repeats: int) -> None:
    """Refuse counted repetitions that multiply beyond `max_repeats`, look-around, and repetitions of nothing
    but an endless repetition, such as `(a+)+`.

    Raises:
        RegexFormError: what is refused.
    """
    _Reader(pattern, max_repeats).alternatives(depth=0)


class _Reader:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str, max_repeats: int) -> None:
        self._text = pattern
        self._at = 0
        self._max_repeats = max_repeats

    def alternatives(self, depth: int) -> _Part:
        """Read up to the end or the closing bracket of a group."""
        if depth > _MAX_DEPTH:
            raise RegexFormError("its groups are nested too deep", f"{_MAX_DEPTH} levels")
        branches: list[list[_Part]] = [[]]
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._text[self._at] == "|":
                self._at += 1
                branches.append([])
            else:
                branches[-1].append(self._repeated(self._one(depth)))
        repeats = sum(max(1, sum(part.repeats for part in branch)) for branch in branches)
        self._check_repeats(repeats)
        return _Part(repeats, len(branches) == 1 == len(branches[0]) and branches[0][0].is_endless)

    def _one(self, depth: int) -> _Part:
        character = self._text[self._at]
        self._at += 1
        if character == "\\":
            self._at += 1
        elif character == "[":
            self._skip_class()
        elif character == "(":
            if self._text.startswith(("?=", "?!", "?<=", "?<!"), self._at):
                raise RegexFormError("it looks around", "expressions without look-ahead or look-behind")
            if (flags := _GROUP_FLAGS.match(self._text, self._at)) is not None:
                self._at = flags.end()
            inner = self.alternatives(depth + 1)
            self._at += 1
            return inner
        return _Part(1, False)

    def _repeated(self, part: _Part) -> _Part:
        while self._at < len(self._text):
            character = self._text[self._at]
            counted = _COUNT.match(self._text, self._at) if character == "{" else None
            if character in "*+?":
                self._at += 1
                low, is_open = 1, character != "?"
            elif counted is not None:
                self._at = counted.end()
                low = int((counted[3] or counted[1])[:12])
                is_open = counted[2] is not None and not counted[3]
            else:
                return part
            # A mark after a repetition makes it reluctant, which is no repetition of its own.
            if self._text.startswith("?", self._at):
                self._at += 1
            if is_open and part.is_endless:
                raise RegexFormError(
                    "it repeats an endless repetition", "one repetition, such as a+ for (a+)+"
                )
            part = _Part(part.repeats * max(low, 1), is_open or (part.is_endless and not is_open))
            self._check_repeats(part.repeats)
        return part

    def _skip_class(self) -> None:
        """Skip a character class, which may hold others and a closing bracket as its first character."""
        level = 1
        if self._text.startswith("^", self._at):
            self._at += 1
        if self._text.startswith("]", self._at):
            self._at += 1
        while self._at < len(self._text) and level:
            match self._text[self._at]:
                case "\\":
                    self._at += 1
                case "[":
                    level += 1
                case "]":
                    level -= 1
            self._at += 1

    def _check_repeats(self, repeats: int) -> None:
        if repeats > self._max_repeats:
            raise RegexFormError(
                f"its repetitions multiply to {repeats}", f"{self._max_repeats} repeated parts"
            )
