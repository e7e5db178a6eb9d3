"""The order of rows: every row once per epoch, the same for the same seed, little padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.dataset import PromptRow
from services.trainer.spec import Schedule
from services.trainer.tokens import TokenRow
from services.trainer.training.batches import IGNORED_LABEL, BatchPlan, collate
from services.trainer.training.schedule import learning_rate


def row(length: int, supervised: int = 1) -> TokenRow:
    mask = [False] * (length - supervised) + [True] * supervised
    return TokenRow(tuple(range(10, 10 + length)), tuple(mask), length - supervised, PromptRow(1, "p", "c"))


@given(
    count=st.integers(1, 90),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_row_comes_once_in_an_epoch(count: int, batch_size: int, accumulation: int, seed: int) -> None:
    rows = [row(2 + i % 7) for i in range(count)]
    plan = BatchPlan(rows, batch_size, accumulation, 3, seed)
    for epoch in range(3):
        steps = plan.epoch(epoch)
        assert sorted(index for step in steps for index in step) == list(range(count))
        assert len(steps) == plan.steps_per_epoch
        assert all(len(plan.micro_batches(step, 0)) <= accumulation for step in steps)
        assert steps == plan.epoch(epoch)


def test_order_changes_with_seed_and_epoch() -> None:
    rows = [row(4) for _ in range(40)]
    plan = BatchPlan(rows, 4, 1, 2, 1)
    assert plan.epoch(0) != plan.epoch(1)
    assert plan.epoch(0) != BatchPlan(rows, 4, 1, 2, 2).epoch(0)


def test_rows_of_a_step_do_not_depend_on_how_it_is_cut() -> None:
    rows = [row(2 + i % 9) for i in range(50)]
    assert BatchPlan(rows, 8, 1, 1, 3).epoch(0) == BatchPlan(rows, 1, 8, 1, 3).epoch(0)


def test_rows_of_like_length_meet() -> None:
    rows = [row(2 + (i * 7) % 60) for i in range(160)]
    padded = sum(
        max(len(rows[i].ids) for i in step) * len(step) for step in BatchPlan(rows, 8, 1, 1, 3).epoch(0)
    )
    assert padded < 1.15 * sum(len(r.ids) for r in rows)


def test_padding_is_on_the_right_and_counts_for_nothing() -> None:
    batch = collate([row(3), row(5, supervised=2)], pad_id=7)
    assert batch.input_ids.tolist() == [[10, 11, 12, 7, 7], [10, 11, 12, 13, 14]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    ignored = IGNORED_LABEL
    assert batch.labels.tolist() == [
        [ignored, ignored, 12, ignored, ignored],
        [ignored, ignored, ignored, 13, 14],
    ]
    assert (batch.num_tokens, batch.num_supervised) == (8, 3)
    assert batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule.CONSTANT, [0.5, 1.0, 1.0, 1.0, 1.0]),
        (Schedule.LINEAR, [0.5, 1.0, 0.75, 0.5, 0.25]),
        (Schedule.COSINE, [0.5, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rate(schedule: Schedule, rates: list[float]) -> None:
    found = [
        learning_rate(step, total_steps=5, peak=1.0, warmup_ratio=0.2, schedule=schedule) for step in range(5)
    ]
    assert found == pytest.approx(rates)
