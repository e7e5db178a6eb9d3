"""Scores of answers against hand-computed values, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.spec import TaskMetric
from services.trainer.training.scores import (
    AnswerScore,
    bootstrap_interval,
    exact_match,
    last_number,
    numeric,
    rouge_l,
    token_f1,
)


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1", "rouge"),
    [
        ("red", " red\n", 1, 1, 1),
        ("Red", "red", 0, 1, 1),
        ("", "red", 0, 0, 0),
        ("the cat sat", "the cat ran", 0, 2 / 3, 2 / 3),
        # All three words are there, but only two of them in order.
        ("a b c", "c a b", 0, 1, 2 / 3),
        ("a a a", "a", 0, 0.5, 0.5),
        ("police killed the gunman", "police kill the gunman", 0, 0.75, 0.75),
    ],
)
def test_text_scores(answer: str, reference: str, match: float, f1: float, rouge: float) -> None:
    assert exact_match(answer, reference) == match
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert rouge_l(answer, reference) == pytest.approx(rouge)


@pytest.mark.parametrize(
    ("text", "number"),
    [("it is 1,234.5 in all", 1234.5), ("3 then -4", -4.0), ("none", None), ("7.", 7.0), ("9" * 400, None)],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric() -> None:
    assert numeric("so 1,000", "1000.0") == 1.0
    assert numeric("no idea", "1") == 0.0


def test_pearson_of_answers() -> None:
    score = AnswerScore(TaskMetric.PEARSON, ["1", "2", "about 3"], ["2", "4", "6"])
    assert score.of(np.arange(3)) == pytest.approx(1.0)
    assert AnswerScore(TaskMetric.PEARSON, ["1", "1"], ["2", "4"]).of(np.arange(2)) == 0.0


def test_interval_holds_the_mean_and_narrows_with_rows() -> None:
    def width(rows: int) -> float:
        answers = ["yes"] * rows
        references = ["yes", "no"] * (rows // 2)
        score = AnswerScore(TaskMetric.EXACT_MATCH, answers, references)
        low, high = bootstrap_interval(score.of, rows, seed=1)
        assert low < 0.5 < high
        assert (low, high) == bootstrap_interval(score.of, rows, seed=1)
        return high - low

    # A mean of 400 coin tosses lies within about 2 * 0.5 / 20 of one half.
    assert width(400) == pytest.approx(0.098, abs=0.02)
    assert width(40) > 2 * width(400)
