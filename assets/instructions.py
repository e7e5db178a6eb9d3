"""Seeded generator of instruction-shaped text for pretraining.

Documents come in two shapes: plain (a prompt that ends with a line break, then the completion) and chat (the
turns of the bundled chat template). The demo tasks of `assets.demo_tasks` are left out on purpose: their
instructions, labels, keys, commands and things do not occur here, so that the demo measures what an adapter
learns and not what the base saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from assets.exercise import Exercise, Kind
from assets.instruction_kinds import KINDS

_SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer in one line.",
    "Be short and exact.",
    "Do what the user asks.",
    "You answer without any comment.",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt that ends with a line break and its completion, without outer blanks."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One chat message; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class InstructionGenerator:
    """Draws instruction documents without end; the same seed gives the same documents."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self._kinds: tuple[Kind, ...] = tuple(kind for kind, _ in KINDS)
        self._weights = [weight for _, weight in KINDS]

    def rows(self) -> Iterator[Row]:
        """Yields prompts with their completions; one to three of the same kind follow each other."""
        while True:
            yield from map(self._row, self._exercises())

    def plain_documents(self) -> Iterator[str]:
        """Yields `rows` as text, one prompt with its completion a document."""
        for row in self.rows():
            yield row.prompt + row.completion

    def chats(self) -> Iterator[tuple[Turn, ...]]:
        """Yields conversations of one to three questions of the same kind, each with its answer."""
        while True:
            yield tuple(self._turns())

    def _exercises(self) -> list[Exercise]:
        kind = self._rng.choices(self._kinds, self._weights)[0]
        return [kind(self._rng) for _ in range(self._rng.choices((1, 2, 3), (6, 1, 1))[0])]

    def _row(self, exercise: Exercise) -> Row:
        layout = self._rng.choices(
            (
                "{e.instruction}\n\n{e.label}: {e.text}\n\n{e.answer_label}:\n",
                "{e.instruction}\n{e.label}: {e.text}\n{e.answer_label}:\n",
                "{e.label}: {e.text}\n\n{e.instruction}\n",
                "{e.instruction}\n{e.text}\n",
                "Instruction: {e.instruction}\nInput: {e.text}\nOutput:\n",
            ),
            (5, 2, 2, 2, 1),
        )[0]
        return Row(layout.format(e=exercise), exercise.answer)

    def _turns(self) -> Iterator[Turn]:
        if self._rng.random() < 0.3:
            yield Turn("system", self._rng.choice(_SYSTEM_TEXTS))
        for exercise in self._exercises():
            asked = f"{exercise.instruction}\n{exercise.text}"
            if self._rng.random() < 0.5:
                asked = f"{exercise.instruction}\n\n{exercise.label}: {exercise.text}"
            yield Turn("user", asked)
            yield Turn("assistant", exercise.answer)
