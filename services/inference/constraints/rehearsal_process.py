"""Compiles what strangers wrote, and may die of it: `python -m` this module.

The first line on standard input is the vocabulary; each further line is one constraint, and each is answered
by one line: `{"error": null}`, or why it does not compile. The process limits its own memory and, for each
constraint, its own time, so that it ends even when nobody is left to kill it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator

from services.inference.constraints.grammar import ConstraintKind, matcher
from services.inference.constraints.vocabulary import Vocabulary


def main() -> None:
    """Serve until the input ends."""
    lines = _lines()
    first = next(lines, None)
    if first is None:
        return
    header = json.loads(first)
    tokenizer = Vocabulary(
        tuple(bytes.fromhex(token) for token in header["tokens"]),
        tuple(header["special_token_ids"]),
        tuple(header["eos_token_ids"]),
    ).compiled()
    resource.setrlimit(resource.RLIMIT_AS, (header["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _answer(None)
    for line in lines:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, header["limit_seconds"])
        error = None
        try:
            matcher(ConstraintKind(job["kind"]), job["text"], tokenizer)
        except ValueError as refusal:
            error = str(refusal)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(error)


def _answer(error: str | None) -> None:
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line


if __name__ == "__main__":
    main()
