"""Scores of generated answers, with bootstrap intervals.

Every metric first turns one answer into a row of evidence, a few numbers, and then the evidence of all rows
into one value. So the bootstrap (Efron 1979) draws rows, whatever the metric.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Evidence = tuple[float, ...]
Matrix = NDArray[np.float64]
Rows = NDArray[np.intp]

RESAMPLES = 2000
# Longer ones are no numbers anybody meant, and would overflow.
_MAX_DIGITS = 64
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WHERE = re.compile(r"\bwhere\b", re.IGNORECASE)
_AND = re.compile(r"\s+and\s+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    """What a row's answer is compared with."""

    completion: str
    references: tuple[str, ...] = ()
    answer: str | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """All texts that count as right."""
        return self.references or (self.completion,)


@dataclass(frozen=True, slots=True)
class Metric:
    """How answers are scored: evidence of one answer, and the value of the evidence `[rows, numbers]`."""

    name: str
    evidence: Callable[[str, Target], Evidence] = field(repr=False)
    value: Callable[[Matrix], float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Score:
    """A value and the 95 % interval around it."""

    value: float
    low: float
    high: float


def score(metric: Metric, answers: Sequence[str], targets: Sequence[Target]) -> Score:
    """Return the score of all answers with its bootstrap interval."""
    evidence = evidence_of(metric, answers, targets)
    return with_interval(lambda rows: metric.value(evidence[rows]), len(answers))


def lift(metric: Metric, before: Sequence[str], after: Sequence[str], targets: Sequence[Target]) -> Score:
    """Return how much higher `after` scores than `before` on the same rows.

    The interval is paired: each draw takes both answers of a row.
    """
    old, new = evidence_of(metric, before, targets), evidence_of(metric, after, targets)
    return with_interval(lambda rows: metric.value(new[rows]) - metric.value(old[rows]), len(targets))


def with_interval(statistic: Callable[[Rows], float], num_rows: int, *, seed: int = 0) -> Score:
    """Return `statistic` of all rows and the 95 % percentile interval over `RESAMPLES` draws of them.

    Efron 1979. `statistic` takes row indices [num_rows] and returns the figure of those rows.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, num_rows, num_rows)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Score(statistic(np.arange(num_rows)), float(low), float(high))


def evidence_of(metric: Metric, answers: Sequence[str], targets: Sequence[Target]) -> Matrix:
    """Return the evidence of each answer, [rows, numbers]."""
    pairs = zip(answers, targets, strict=True)
    return np.array([metric.evidence(answer, target) for answer, target in pairs], dtype=np.float64)


# Evidence of one answer.


def equal(answer: str, target: Target) -> Evidence:
    """1 where the answer, blanks squeezed, is the completion."""
    return (float(_squeezed(answer) == _squeezed(target.completion)),)


def first_letter(answer: str, target: Target) -> Evidence:
    """1 where the first letter of the answer is the completion."""
    letter = next((character for character in answer if character.isalpha()), "")
    return (float(letter == target.completion),)


def same_query(answer: str, target: Target) -> Evidence:
    """1 for the same SQL query: case, blanks and the order of the conditions do not count."""
    return (float(_query(answer) == _query(target.completion)),)


def same_number(answer: str, target: Target) -> Evidence:
    """1 where the number after `####`, or else the last one, equals the answer as a number."""
    expected = target.answer if target.answer is not None else target.completion
    found, wanted = _final_number(answer), _final_number(expected)
    return (float(found is not None and wanted is not None and math.isclose(found, wanted)),)


def rouge_l(answer: str, target: Target) -> Evidence:
    """ROUGE-L F1 (Lin 2004, section 3) over words in lower case, the best of all references."""
    return (max(_rouge_l(_words(answer), _words(text)) for text in target.accepted),)


def token_f1(answer: str, target: Target) -> Evidence:
    """F1 of the words as sets with counts, without case, punctuation and articles (Rajpurkar et al. 2016)."""
    return (max(_token_f1(_bare_words(answer), _bare_words(text)) for text in target.accepted),)


def entities(answer: str, target: Target) -> Evidence:
    """Entities found rightly, found, and there, of a JSON object from type to list of texts."""
    found, wanted = _entities(answer), _entities(target.completion)
    return (float((found & wanted).total()), float(found.total()), float(wanted.total()))


def number_pair(answer: str, target: Target) -> Evidence:
    """The first number of the answer, NaN where it has none, and the wanted one."""
    found, wanted = _numbers(answer), _numbers(target.completion)
    return (found[0] if found else math.nan, wanted[0] if wanted else math.nan)


# The value of all evidence.


def mean(evidence: Matrix) -> float:
    """Mean of the first number."""
    return float(evidence[:, 0].mean())


def micro_f1(evidence: Matrix) -> float:
    """F1 of the summed counts (right, found, there); 1 where nothing is there and nothing was found."""
    right, found, wanted = evidence.sum(axis=0)
    return float(2 * right / (found + wanted)) if found + wanted else 1.0


def pearson(evidence: Matrix) -> float:
    """Pearson's correlation of the two columns; 0 where one of them does not vary.

    An answer without a number counts as the mean of the wanted ones, so that it neither helps nor harms.
    """
    evidence = evidence[~np.isnan(evidence[:, 1])]
    if not len(evidence):
        return 0.0
    evidence = np.where(np.isnan(evidence), evidence[:, 1].mean(), evidence)
    centred = evidence - evidence.mean(axis=0)
    spread = float(np.sqrt((centred**2).sum(axis=0).prod()))
    return float((centred[:, 0] * centred[:, 1]).sum() / spread) if spread > 0 else 0.0


EXACT_MATCH = Metric("exact_match", equal, mean)
ACCURACY = Metric("accuracy", equal, mean)
LETTER_ACCURACY = Metric("accuracy", first_letter, mean)
QUERY_MATCH = Metric("exact_match", same_query, mean)
NUMBER_MATCH = Metric("exact_match", same_number, mean)
ROUGE_L = Metric("rouge_l", rouge_l, mean)
TOKEN_F1 = Metric("token_f1", token_f1, mean)
ENTITY_F1 = Metric("entity_f1", entities, micro_f1)
PEARSON = Metric("pearson", number_pair, pearson)

# By the names under which a job asks for them.
METRICS = {
    "exact_match": EXACT_MATCH,
    "accuracy": ACCURACY,
    "choice_letter": LETTER_ACCURACY,
    "sql_match": QUERY_MATCH,
    "numeric": NUMBER_MATCH,
    "rouge_l": ROUGE_L,
    "token_f1": TOKEN_F1,
    "entity_f1": ENTITY_F1,
    "pearson": PEARSON,
}


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _query(text: str) -> tuple[str, tuple[str, ...]]:
    head, *conditions = _WHERE.split(_squeezed(text).rstrip("; "), maxsplit=1)
    parts = _AND.split(conditions[0]) if conditions else []
    return head.strip().lower(), tuple(sorted(part.strip().lower() for part in parts))


def _final_number(text: str) -> float | None:
    numbers = _numbers(text.rpartition("####")[2])
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[float]:
    found = (number.replace(",", "") for number in _NUMBER.findall(text))
    return [float(number) for number in found if len(number) <= _MAX_DIGITS]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _rouge_l(answer: list[str], reference: list[str]) -> float:
    common = _longest_common_subsequence(answer, reference)
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = row[index]
            row[index] = diagonal + 1 if word == other else max(above, row[index - 1])
            diagonal = above
    return row[-1]


def _bare_words(text: str) -> Counter[str]:
    without = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(_ARTICLES.sub(" ", without).split())


def _token_f1(answer: Counter[str], reference: Counter[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (answer & reference).total()
    return 2 * common / (answer.total() + reference.total())


def _entities(text: str) -> Counter[tuple[str, str]]:
    try:
        value: Any = json.loads(text)
    except ValueError:
        return Counter()
    if not isinstance(value, dict):
        return Counter()
    lists = ((kind, names) for kind, names in value.items() if isinstance(names, list))
    return Counter((kind, name) for kind, names in lists for name in names if isinstance(name, str))
