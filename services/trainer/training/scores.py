"""How answers are scored against references, and how sure a figure is."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.trainer.spec import TaskMetric

RESAMPLES = 1000
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WORD = re.compile(r"\w+")

Floats = NDArray[np.float64]


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where the texts are equal but for blanks around them, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over lower-cased words, counted with multiplicity."""
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2.0 * common / (len(said) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004, ROUGE-L with beta 1)."""
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    best = [0] * (len(wanted) + 1)
    for word in said:
        diagonal = 0
        for index, other in enumerate(wanted, start=1):
            above = best[index]
            best[index] = diagonal + 1 if word == other else max(above, best[index - 1])
            diagonal = above
    return 2.0 * best[-1] / (len(said) + len(wanted))


def numeric(answer: str, reference: str) -> float:
    """Return 1 where the last number of both texts is the same, else 0."""
    said, wanted = last_number(answer), last_number(reference)
    return float(said is not None and wanted is not None and math.isclose(said, wanted, rel_tol=1e-9))


def last_number(text: str) -> float | None:
    """Return the last number in `text`, thousands separators allowed, or None."""
    found = _NUMBER.findall(text)
    # Longer ones are no numbers anybody meant, and would overflow.
    return float(found[-1].replace(",", "")) if found and len(found[-1]) <= 64 else None


def pearson(answers: Floats, references: Floats) -> float:
    """Return the correlation of two [rows] arrays; 0 where one of them does not vary."""
    if answers.std() == 0 or references.std() == 0:
        return 0.0
    return float(np.corrcoef(answers, references)[0, 1])


_PER_ROW: dict[TaskMetric, Callable[[str, str], float]] = {
    TaskMetric.EXACT_MATCH: exact_match,
    TaskMetric.ROUGE_L: rouge_l,
    TaskMetric.TOKEN_F1: token_f1,
    TaskMetric.NUMERIC: numeric,
}


class AnswerScore:
    """The score of a set of answers by one metric, over all rows or a resampling of them."""

    def __init__(self, metric: TaskMetric, answers: Sequence[str], references: Sequence[str]) -> None:
        """Score `answers`; with PEARSON a text without a number counts as 0."""
        self._is_pearson = metric is TaskMetric.PEARSON
        if self._is_pearson:
            columns = [[last_number(text) or 0.0 for text in texts] for texts in (answers, references)]
        else:
            score = _PER_ROW[metric]
            columns = [[score(said, wanted) for said, wanted in zip(answers, references, strict=True)]]
        self._columns = np.asarray(columns, dtype=np.float64)

    def of(self, rows: NDArray[np.intp]) -> float:
        """Return the score over the rows with these indices."""
        chosen = self._columns[:, rows]
        return pearson(chosen[0], chosen[1]) if self._is_pearson else float(chosen[0].mean())


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float], num_rows: int, *, seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic` over `RESAMPLES` resamplings of the rows.

    Efron 1979. `statistic` takes row indices [num_rows] and returns the figure over those rows.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, num_rows, num_rows)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
