"""Seeded documents whose answers are words of the document itself, so that the base learns to copy.

Stories and small exercises hardly reward quoting a word that was never seen before; these documents do: lists
that are asked again, quoted names, fields taken out of a sentence, JSON from facts, rewrites. Their words are
drawn at random, so remembering does not help. One word in ten is held back (`is_held_out`), for
`assets.copy_probe` to ask with words that no document of this generator contains. The wordings are apart from
those of the demo tasks, and the words that the demo is about are left out.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from assets.demo_words import DEMO_WORDS
from assets.words import NAMES, TOWNS, made_up_word

_VOCABULARY_WORD = re.compile(r"Ġ([a-z]{3,})")
_HELD_OUT_ONE_IN = 10


def is_held_out(word: str) -> bool:
    """Whether a word is kept for the probe; decided by its letters alone."""
    return zlib.crc32(word.encode()) % _HELD_OUT_ONE_IN == 0


def vocabulary_words(tokenizer: Tokenizer) -> list[str]:
    """Returns the tokenizer's own whole words of three letters or more, without those of the demo, sorted."""
    found = (_VOCABULARY_WORD.fullmatch(token) for token in tokenizer.get_vocab())
    return sorted(match[1] for match in found if match and match[1] not in DEMO_WORDS)


@dataclass(frozen=True, slots=True)
class WordSource:
    """Draws words: of the tokenizer, made up of syllables, of two parts, names, and numbers."""

    words: tuple[str, ...]

    @classmethod
    def training(cls, tokenizer: Tokenizer) -> WordSource:
        """Returns the words that are not held out."""
        return cls(tuple(word for word in vocabulary_words(tokenizer) if not is_held_out(word)))

    @classmethod
    def held_out(cls, tokenizer: Tokenizer) -> WordSource:
        """Returns the words that are."""
        return cls(tuple(word for word in vocabulary_words(tokenizer) if is_held_out(word)))

    def word(self, rng: Random) -> str:
        """Returns one word in lower case, common or made up."""
        kind = rng.random()
        if kind < 0.55:
            return rng.choice(self.words)
        return made_up_word(rng) if kind < 0.9 else f"{rng.choice(self.words)}-{made_up_word(rng)}"

    def value(self, rng: Random) -> str:
        """Returns something worth quoting: a word, a name, a number or a few words."""
        kind = rng.random()
        if kind < 0.45:
            return self.word(rng)
        if kind < 0.60:
            return self.name(rng)
        if kind < 0.78:
            return self.number(rng)
        return " ".join(self.word(rng) for _ in range(rng.randint(2, 4)))

    def name(self, rng: Random) -> str:
        """Returns a capitalised name, known or made up, of one or two parts."""
        first = rng.choice(NAMES) if rng.random() < 0.3 else made_up_word(rng).title()
        return first if rng.random() < 0.6 else f"{first} {self.word(rng).title()}"

    def number(self, rng: Random) -> str:
        """Returns a number of one to five digits, some with a decimal part."""
        whole = str(rng.randrange(10 ** rng.randint(1, 5)))
        return f"{whole}.{rng.randrange(100):02d}" if rng.random() < 0.15 else whole


def _keys(words: WordSource, rng: Random, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[words.word(rng)] = None
    return list(keys)


def ledger(words: WordSource, rng: Random) -> str:
    """Entries in a list, asked again in another order."""
    keys = _keys(words, rng, rng.randint(2, 9))
    book = {key: words.value(rng) for key in keys}
    joiner = rng.choice((": ", " = ", " -> ", " is ", "\t", " | "))
    asked = rng.choices(keys, k=rng.randint(2, 10))
    heading = rng.choice(("", "Ledger\n", "Notes:\n", f"{words.name(rng)}'s list\n"))
    again = rng.choice(("\n", "\nAsked again:\n", "\n\n", "\n--\n"))
    lines = "\n".join(f"{key}{joiner}{value}" for key, value in book.items())
    return heading + lines + again + "\n".join(f"{key}{joiner}{book[key]}" for key in asked)


def questions(words: WordSource, rng: Random) -> str:
    """Facts in one line, and questions on them with answers."""
    keys = _keys(words, rng, rng.randint(2, 6))
    book = {key: words.value(rng) for key in keys}
    fact, ask = rng.choice(
        (
            ("The {} is {}.", "What is the {}?"),
            ("{} goes with {}.", "What goes with {}?"),
            ("Under {} we keep {}.", "What do we keep under {}?"),
            ("{} was sold for {}.", "For what was {} sold?"),
        )
    )
    facts = " ".join(fact.format(key, value) for key, value in book.items())
    asked = rng.sample(keys, rng.randint(1, len(keys)))
    return facts + "\n" + "\n".join(f"{ask.format(key)}\n{book[key]}" for key in asked)


def quotation(words: WordSource, rng: Random) -> str:
    """Somebody says something, and it is said again word for word."""
    said = " ".join(words.word(rng) for _ in range(rng.randint(1, 12)))
    first, other = words.name(rng), words.name(rng)
    return rng.choice(
        (
            '"{s}," said {a}.\n"What did {a} say?" asked {b}.\n"{s}."',
            'On the door stood: {s}\n{a} read it aloud: "{s}"',
            "{a} wrote to {b}: {s}\n{b} read: {s}\n{a} had written it and {b} had read it.",
            "Message from {a} to {b}: {s}\nFrom: {a}\nTo: {b}\nMessage: {s}",
            "{a}: {s}\n{b}: {s}\n{a}: {s}",
        )
    ).format(s=said, a=first, b=other)


def fields(words: WordSource, rng: Random) -> str:
    """A sentence, then its parts as lines, a call, JSON or pairs."""
    parts = {
        "who": words.name(rng),
        "what": words.word(rng),
        "where": rng.choice((rng.choice(TOWNS), words.name(rng))),
        "number": words.number(rng),
        "with": words.word(rng),
    }
    sentence = rng.choice(
        (
            "{who} took {number} {what} to {where} with the {with}.",
            "In {where}, {who} counted {number} {what} and one {with}.",
            "With a {with}, {number} {what} came from {who} of {where}.",
            "{number} {what} for {who}, by {with}, {where}.",
        )
    ).format(**parts)
    keys = rng.sample(tuple(parts), rng.randint(1, len(parts)))
    chosen = {key: parts[key] for key in keys}
    form = rng.choice(("lines", "json", "call", "pairs"))
    if form == "lines":
        return sentence + "\n" + "\n".join(f"{key}: {value}" for key, value in chosen.items())
    if form == "json":
        return f"{sentence}\n{', '.join(keys)} as JSON:\n{json.dumps(chosen)}"
    if form == "call":
        return f"{sentence}\n({', '.join(keys)})\n({', '.join(chosen.values())})"
    return f"{sentence}\n" + " ".join(f"{key}=<{value}>" for key, value in chosen.items())


def facts_as_json(words: WordSource, rng: Random) -> str:
    """Facts with keys never seen, as a JSON object, or an object as facts."""
    record = {key: words.value(rng) for key in _keys(words, rng, rng.randint(1, 6))}
    pattern = rng.choice(("{}: {}", "{} is {}", "{} - {}", "the {} of it was {}"))
    plain = rng.choice(("; ", ", ", "\n")).join(pattern.format(key, value) for key, value in record.items())
    written = json.dumps(record, indent=rng.choice((None, None, 1)))
    return f"{plain}\n{written}" if rng.random() < 0.7 else f"{written}\n{plain}"


def rewrite(words: WordSource, rng: Random) -> str:
    """The same content in another order, twice or three times by the same pattern."""
    first, second = rng.choice(
        (
            ("{a} gave {b} the {x}.", "The {x} was given to {b} by {a}."),
            ("{a} sees {b} and {x}.", "{x} and {b} are seen by {a}."),
            ("{a} / {b} / {x}", "{x} / {b} / {a}"),
            ("{a} likes {x} better than {b}.", "Better than {b}, {a} likes {x}."),
            ("if {a} then {x} else {b}", "{x} when {a}, otherwise {b}"),
            ("{a}[{b}] {x}", "{b} of {a}, {x}"),
        )
    )
    pairs = []
    for _ in range(rng.randint(1, 3)):
        slots = {"a": words.name(rng), "b": words.value(rng), "x": words.word(rng)}
        pairs.append(first.format(**slots) + "\n" + second.format(**slots))
    return "\n".join(pairs)


def table(words: WordSource, rng: Random) -> str:
    """A small table with a header, then rows or cells of it asked again."""
    header = _keys(words, rng, rng.randint(2, 4))
    rows = [[words.value(rng) for _ in header] for _ in range(rng.randint(2, 4))]
    bar = rng.choice((" | ", ", ", " ; "))
    lines = [bar.join(header), *(bar.join(row) for row in rows)]
    for row in rng.choices(rows, k=rng.randint(1, 4)):
        column = rng.randrange(1, len(header))
        lines.append(f"{header[0]} {row[0]} {header[column]} {row[column]}")
    return "\n".join(lines)


CopyKind = Callable[[WordSource, Random], str]

KINDS: tuple[tuple[CopyKind, float], ...] = (
    (ledger, 3.0),
    (questions, 2.0),
    (quotation, 2.5),
    (fields, 2.0),
    (facts_as_json, 1.5),
    (rewrite, 1.5),
    (table, 1.0),
)


def copy_documents(words: WordSource, count: int, seed: int) -> Iterator[str]:
    """Yields `count` documents; the same seed gives the same text."""
    rng = Random(f"copying:{seed}")
    kinds, weights = [kind for kind, _ in KINDS], [weight for _, weight in KINDS]
    for _ in range(count):
        yield rng.choices(kinds, weights)[0](words, rng)
