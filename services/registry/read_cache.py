"""What the index answered of late, for the time that the index is away.

Only one process writes, so an answer stays right until that process writes to one of the keys it came from.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from services.registry.index import Command

MAX_BYTES = 32 * 1024 * 1024
MAX_ANSWER_BYTES = 256 * 1024
_ENTRY_BYTES = 1024

_Question = tuple[Command, ...]


class ReadCache:
    """Answers by what was asked, at most `max_bytes` of them; the longest unused goes first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._answers: OrderedDict[_Question, tuple[list[Any], int]] = OrderedDict()
        self._questions: defaultdict[str, set[_Question]] = defaultdict(set)

    def keep(self, question: Sequence[Command], answers: list[Any]) -> None:
        """Remember what is true now; an answer above `MAX_ANSWER_BYTES` is not worth its room."""
        question = tuple(question)
        if question in self._answers:
            # Had it been overwritten meanwhile, it would have been forgotten.
            self._answers.move_to_end(question)
            return
        size_bytes = _ENTRY_BYTES + _size_bytes(answers)
        if not question or size_bytes > MAX_ANSWER_BYTES:
            return
        self._answers[question] = (answers, size_bytes)
        self._size_bytes += size_bytes
        for key in _keys(question):
            self._questions[key].add(question)
        while self._size_bytes > self._max_bytes:
            self._forget(next(iter(self._answers)))

    def find(self, question: Sequence[Command]) -> list[Any] | None:
        """Return the answers, where they are known and still true."""
        found = self._answers.get(tuple(question))
        return None if found is None else found[0]

    def overwritten(self, writes: Iterable[Command]) -> None:
        """Forget every answer that came from a key that is written to."""
        for key in _keys(writes):
            for question in tuple(self._questions.get(key, ())):
                self._forget(question)

    def clear(self) -> None:
        """Forget everything."""
        self._answers.clear()
        self._questions.clear()
        self._size_bytes = 0

    def _forget(self, question: _Question) -> None:
        _, size_bytes = self._answers.pop(question)
        self._size_bytes -= size_bytes
        for key in _keys(question):
            self._questions[key].discard(question)
            if not self._questions[key]:
                del self._questions[key]


def _keys(commands: Iterable[Command]) -> set[str]:
    return {str(command[1]) for command in commands}


def _size_bytes(answer: Any) -> int:
    if isinstance(answer, list | tuple):
        return sum(map(_size_bytes, answer))
    if isinstance(answer, dict):
        return sum(len(key) + _size_bytes(value) for key, value in answer.items())
    return len(answer) if isinstance(answer, bytes) else 16
