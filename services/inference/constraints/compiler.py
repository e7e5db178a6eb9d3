"""From a constraint's text to what the engine masks with: checked, rehearsed, compiled once and kept."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from llguidance import LLTokenizer

from services.common.errors import FailedPrecondition, InvalidArgument
from services.inference.constraints.checks import check
from services.inference.constraints.grammar import ConstraintKind, matcher
from services.inference.constraints.rehearsal import Rehearsal
from services.inference.constraints.vocabulary import Vocabulary
from services.inference.engine.constraint import Constraint

_LIMIT_SECONDS = 0.8
_MEMORY_BYTES = 4 << 30
_MAX_KEPT = 256


class ConstraintCompiler:
    """Compiles for one vocabulary; belongs to one event loop."""

    def __init__(
        self, vocabulary: Vocabulary, *, limit_seconds: float = _LIMIT_SECONDS, max_kept: int = _MAX_KEPT
    ) -> None:
        self._vocabulary = vocabulary
        self._max_kept = max_kept
        self._rehearsal = Rehearsal(vocabulary, limit_seconds=limit_seconds, memory_bytes=_MEMORY_BYTES)
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[ConstraintKind, str], Constraint] = OrderedDict()
        self._compiling: dict[tuple[ConstraintKind, str], asyncio.Task[Constraint]] = {}

    async def compile(self, kind: ConstraintKind, text: str) -> Constraint:
        """Return the constraint, compiled now or lately; equal texts that come together are compiled once.

        Raises:
            InvalidArgument: `schema_too_complex`, `unsupported_regex` or `unsupported_grammar`.
            FailedPrecondition: `no_eos_token` for a base that could never end a constrained output.
        """
        if not self._vocabulary.eos_token_ids:
            raise FailedPrecondition(
                "no_eos_token",
                "The base has no end token, which constrained output needs.",
                field=_field(kind),
            )
        key = kind, text
        known = self._kept.get(key)
        if known is not None and not known.is_spoiled:
            self._kept.move_to_end(key)
            return known
        task = self._compiling.get(key)
        if task is None:
            task = self._compiling[key] = asyncio.create_task(self._compile(kind, text))
            task.add_done_callback(lambda done: self._compiled(key, done))
        # Whoever asked first may leave; the others still wait for the answer.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what is being compiled, and the child process."""
        tasks = list(self._compiling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._rehearsal.close()

    def _compiled(self, key: tuple[ConstraintKind, str], task: asyncio.Task[Constraint]) -> None:
        del self._compiling[key]
        # Nobody may be left to hear of a failure.
        if task.cancelled() or task.exception() is not None:
            return
        self._kept[key] = task.result()
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)

    async def _compile(self, kind: ConstraintKind, text: str) -> Constraint:
        await asyncio.to_thread(check, kind, text)
        refusal = await self._rehearsal.refusal(kind, text)
        if refusal is not None:
            raise _refused(kind, refusal)
        try:
            return await asyncio.to_thread(self._compile_here, kind, text)
        except ValueError as error:
            raise _refused(kind, str(error)) from error

    def _compile_here(self, kind: ConstraintKind, text: str) -> Constraint:
        if self._tokenizer is None:
            self._tokenizer = self._vocabulary.compiled()
        return Constraint(matcher(kind, text, self._tokenizer), _field(kind), kind.reason)


def _field(kind: ConstraintKind) -> str:
    return f"sampling.{kind.value}"


def _refused(kind: ConstraintKind, why: str) -> InvalidArgument:
    return InvalidArgument(
        kind.reason,
        f"The {_field(kind)} cannot be used: {why}.",
        field=_field(kind),
        limit="see the contract",
    )
