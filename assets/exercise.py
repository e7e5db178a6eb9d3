"""One exercise of the instruction generator, and the lines that exercises are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from assets.words import ADJECTIVES, CARRY_VERBS, COLOURS, NAMES, PLACES, any_noun, any_word, made_up_word


@dataclass(frozen=True, slots=True)
class Exercise:
    """One small task: what to do, on what, and the only right answer (one line without outer blanks)."""

    instruction: str
    label: str
    text: str
    answer_label: str
    answer: str


Kind = Callable[[Random], Exercise]


def words_line(rng: Random, low: int, high: int) -> list[str]:
    return [any_word(rng) for _ in range(rng.randint(low, high))]


def sentence(rng: Random) -> tuple[str, dict[str, str]]:
    """Returns a sentence and its parts: `who`, `verb`, `colour`, `thing`, `place`."""
    parts = {
        "who": rng.choice(NAMES),
        "verb": rng.choice(CARRY_VERBS),
        "colour": rng.choice(COLOURS + ADJECTIVES),
        "thing": any_noun(rng) if rng.random() < 0.8 else made_up_word(rng),
        "place": rng.choice(PLACES),
    }
    pattern = rng.choice(
        (
            "{who} {verb} the {colour} {thing} near the {place}.",
            "In the {place}, {who} {verb} a very {colour} {thing}.",
            "Last week {who} {verb} the {colour} {thing} by the {place}.",
            "Nobody saw that {who} {verb} the {colour} {thing} at the {place}.",
        )
    )
    return pattern.format(**parts), parts
