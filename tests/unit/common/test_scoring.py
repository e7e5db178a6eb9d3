"""Scoring functions against values computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import scoring
from services.common.scoring import Metric, Target


def value(metric: Metric, answer: str, target: Target) -> float:
    return metric.value(np.array([metric.evidence(answer, target)]))


@pytest.mark.parametrize(
    ("metric", "answer", "completion", "expected"),
    [
        (scoring.EXACT_MATCH, " on  level=40\n", "on level=40", 1.0),
        (scoring.EXACT_MATCH, "On level=40", "on level=40", 0.0),
        (scoring.ACCURACY, "positive", "positive", 1.0),
        (scoring.ACCURACY, "positive thing", "positive", 0.0),
        (scoring.LETTER_ACCURACY, " (B) because", "B", 1.0),
        (scoring.LETTER_ACCURACY, "42", "B", 0.0),
        (
            scoring.QUERY_MATCH,
            "select a  from t where c = 'x' and b > 2",
            "SELECT a FROM t WHERE b > 2 AND c = 'X'",
            1.0,
        ),
        (scoring.QUERY_MATCH, "SELECT a FROM t WHERE b > 3", "SELECT a FROM t WHERE b > 2", 0.0),
        (scoring.QUERY_MATCH, "SELECT a FROM t", "SELECT a FROM t WHERE b > 2", 0.0),
        (scoring.NUMBER_MATCH, "3 x 5 = 15\n#### 1,015.0", "#### 1015", 1.0),
        (scoring.NUMBER_MATCH, "I think 7", "#### 8", 0.0),
        (scoring.NUMBER_MATCH, "no number", "#### 8", 0.0),
        (scoring.NUMBER_MATCH, "3 then -4", "-4.0", 1.0),
        (scoring.NUMBER_MATCH, "9" * 400, "9" * 401, 0.0),
        # "the cat sat" in "the cat has sat down": 3 words in common of 3 and 5.
        (scoring.ROUGE_L, "The cat sat.", "the cat has sat down", 2 * 3 / 8),
        # Order counts: the longest common subsequence of (b a) and (a b) is one word.
        (scoring.ROUGE_L, "b a", "a b", 0.5),
        (scoring.ROUGE_L, "", "a b", 0.0),
        # "the" is dropped: {quick, fox} against {quick, brown, fox}.
        (scoring.TOKEN_F1, "the quick fox", "Quick, brown fox!", 2 * 2 / 5),
        (scoring.TOKEN_F1, "fox fox", "fox", 2 * 1 / 3),
        (scoring.TOKEN_F1, "", "fox", 0.0),
        # One of two found is right, one of two is there: 2 * 1 / (2 + 2).
        (
            scoring.ENTITY_F1,
            '{"person": ["Ann", "Bob"]}',
            '{"person": ["Ann"], "place": ["Rome"]}',
            0.5,
        ),
        (scoring.ENTITY_F1, "not json", '{"person": ["Ann"]}', 0.0),
        (scoring.ENTITY_F1, '{"person": []}', '{"person": []}', 1.0),
    ],
)
def test_one_row(metric: Metric, answer: str, completion: str, expected: float) -> None:
    assert value(metric, answer, Target(completion)) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    target = Target("something else", references=("something else", "a red car"))
    assert value(scoring.ROUGE_L, "a red car", target) == 1.0
    assert value(scoring.TOKEN_F1, "red car", target) == 1.0


def test_the_answer_field_is_what_maths_compares_with() -> None:
    assert value(scoring.NUMBER_MATCH, "so it is 12", Target("text #### 99", answer="12")) == 1.0


def test_micro_f1_sums_counts_over_rows() -> None:
    # Rows: 1 right of 1 found and 1 there; 0 right of 3 found and 1 there. 2 * 1 / (4 + 2).
    evidence = np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 1.0]])
    assert scoring.micro_f1(evidence) == pytest.approx(1 / 3)


def test_pearson() -> None:
    targets = [Target(text) for text in ("1.0", "2.0", "3.0", "4.0")]
    # Unreadable counts as the mean of the wanted ones, 2.5: correlation of (1, 3, 2.5, 5) with (1, 2, 3, 4).
    answers = ["1", "about 3", "no idea", "5.0"]
    expected = np.corrcoef([1, 3, 2.5, 5], [1, 2, 3, 4])[0, 1]
    assert scoring.score(scoring.PEARSON, answers, targets).value == pytest.approx(expected)
    assert scoring.score(scoring.PEARSON, ["same"] * 4, targets).value == 0.0


def test_intervals_hold_the_value_and_shrink_with_rows() -> None:
    few, many = [Target("x")] * 20, [Target("x")] * 500
    small = scoring.score(scoring.ACCURACY, ["x", "y"] * 10, few)
    large = scoring.score(scoring.ACCURACY, ["x", "y"] * 250, many)
    assert small.value == large.value == 0.5
    assert small.low < 0.5 < small.high
    assert large.high - large.low < small.high - small.low
    # Half of 500: a standard error of 0.0224, so 1.96 of them to each side.
    assert large.low == pytest.approx(0.5 - 0.0438, abs=0.008)
    assert large.high == pytest.approx(0.5 + 0.0438, abs=0.008)


def test_a_lift_is_paired() -> None:
    targets = [Target("x")] * 100
    before = ["x" if row % 2 else "y" for row in range(100)]
    # The same rows right: no draw can show a difference, although each score alone has a wide interval.
    same = scoring.lift(scoring.ACCURACY, before, before, targets)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = scoring.lift(scoring.ACCURACY, before, ["x"] * 100, targets)
    assert better.value == 0.5
    assert 0.35 < better.low < 0.5 < better.high < 0.65


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_rouge_l_is_symmetric_and_bounded(first: list[str], second: list[str]) -> None:
    there = scoring.rouge_l(" ".join(first), Target(" ".join(second)))
    back = scoring.rouge_l(" ".join(second), Target(" ".join(first)))
    assert there == back
    assert 0.0 <= there[0] <= 1.0
    if first == second and first:
        assert there == (1.0,)


@given(st.text())
def test_no_answer_breaks_a_metric(answer: str) -> None:
    target = Target('{"person": ["Ann"]}', ("a",), "3")
    for metric in (
        scoring.EXACT_MATCH,
        scoring.LETTER_ACCURACY,
        scoring.QUERY_MATCH,
        scoring.NUMBER_MATCH,
        scoring.ROUGE_L,
        scoring.TOKEN_F1,
        scoring.ENTITY_F1,
    ):
        assert 0.0 <= metric.value(np.array([metric.evidence(answer, target)])) <= 1.0
    assert len(scoring.PEARSON.evidence(answer, Target("1.5"))) == 2
