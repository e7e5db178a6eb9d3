"""What the served models answered, in a file that survives a crash, so that no answer is asked for twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lorafleet.demo.traffic import Ask
from lorafleet.experiment.ledger import LedgerError
from lorafleet.experiment.plan import Cell


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer; `refusal` is the error's code where the request was refused, with an empty text."""

    text: str
    tokens: int
    refusal: str = ""


def asks_of(cell: Cell, model: str) -> list[Ask]:
    """Return the requests that have `model` answer the test rows of the cell's task, greedily."""
    task = cell.task
    return [Ask(model, row.prompt, task.max_answer_tokens, tuple(task.stop)) for row in task.test]


def digest_of(ask: Ask) -> str:
    """Return SHA-256 over all that decides an answer; model names that are asked for never change."""
    parts = [ask.model, ask.prompt, ask.max_tokens, list(ask.stop)]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


class Replies:
    """Answers by request, kept in a file of one JSON object per line. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path`, new or not; a last line that a crash cut short is dropped.

        Raises:
            LedgerError: it is something else.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole_bytes = data.rfind(b"\n") + 1
        try:
            self._replies = dict(_entry(line) for line in data[:whole_bytes].splitlines())
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"{path} is no file of answers: {error!r}") from error
        self._file = path.open("ab")
        self._file.truncate(whole_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, ask: Ask) -> bool:
        return digest_of(ask) in self._replies

    def of(self, asks: Sequence[Ask]) -> list[Reply]:
        """Return the answers to `asks`; all of them must be there."""
        return [self._replies[digest_of(ask)] for ask in asks]

    def add(self, ask: Ask, reply: Reply) -> None:
        """Keep an answer."""
        digest = digest_of(ask)
        entry: Mapping[str, Any] = {
            "ask": digest,
            "text": reply.text,
            "tokens": reply.tokens,
            "refusal": reply.refusal,
        }
        self._file.write(json.dumps(entry).encode("ascii") + b"\n")
        self._file.flush()
        self._replies[digest] = reply


def _entry(line: bytes) -> tuple[str, Reply]:
    entry: dict[str, Any] = json.loads(line)
    digest = str(entry.pop("ask"))
    return digest, Reply(**entry)
