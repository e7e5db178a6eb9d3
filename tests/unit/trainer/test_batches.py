"""The order of rows: every row once per epoch, the same for the same seed, packed without gaps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.dataset import PromptRow
from services.trainer.spec import Schedule
from services.trainer.tokens import TokenRow
from services.trainer.training.batches import BatchPlan, best_fit, flatten, join
from services.trainer.training.schedule import learning_rate


def row(length: int, supervised: int = 1) -> TokenRow:
    mask = [False] * (length - supervised) + [True] * supervised
    return TokenRow(tuple(range(10, 10 + length)), tuple(mask), length - supervised, PromptRow(1, "p", "c"))


@given(
    count=st.integers(1, 90),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    seed=st.integers(0, 3),
    packed_tokens=st.sampled_from([0, 8, 30]),
    group_by_length=st.booleans(),
)
def test_every_row_comes_once_in_an_epoch(
    count: int, batch_size: int, accumulation: int, seed: int, packed_tokens: int, group_by_length: bool
) -> None:
    rows = [row(2 + i % 7) for i in range(count)]
    plan = BatchPlan(rows, batch_size, accumulation, 3, seed, packed_tokens, group_by_length)
    for epoch in range(3):
        steps = plan.epoch(epoch)
        assert sorted(index for step in steps for each in step for index in each) == list(range(count))
        assert len(steps) == plan.steps_per_epoch
        assert all(len(plan.passes(step)) <= accumulation for step in steps)
        assert steps == plan.epoch(epoch)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_no_bin_overflows_and_no_two_would_fit_in_one(lengths: list[int]) -> None:
    bins = best_fit(range(len(lengths)), lengths, 20)
    assert sorted(index for each in bins for index in each) == list(range(len(lengths)))
    filled = sorted(sum(lengths[index] for index in each) for each in bins)
    assert filled[-1] <= 20
    assert len(filled) == 1 or filled[0] + filled[1] > 20


def test_packing_fills_a_step_with_more_rows() -> None:
    rows = [row(2 + i % 7) for i in range(70)]
    plain, packed = BatchPlan(rows, 2, 1, 1, 0), BatchPlan(rows, 2, 1, 1, 0, packed_tokens=40)
    assert plain.total_steps == 35
    assert packed.total_steps <= 6
    assert max(batch.num_tokens for step in packed.epoch(0) for batch in packed.passes(step)) <= 80


def test_order_changes_with_seed_and_epoch() -> None:
    rows = [row(4) for _ in range(40)]
    plan = BatchPlan(rows, 4, 1, 2, 1)
    assert plan.epoch(0) != plan.epoch(1)
    assert plan.epoch(0) != BatchPlan(rows, 4, 1, 2, 2).epoch(0)


def test_rows_of_a_step_do_not_depend_on_how_it_is_cut() -> None:
    rows = [row(2 + i % 9) for i in range(50)]
    assert BatchPlan(rows, 8, 1, 1, 3).epoch(0) == BatchPlan(rows, 1, 8, 1, 3).epoch(0)


def test_rows_of_like_length_meet_unless_that_is_not_wanted() -> None:
    rows = [row(2 + (i * 7) % 60) for i in range(160)]

    def padded(group_by_length: bool) -> int:
        steps = BatchPlan(rows, 8, 1, 1, 3, group_by_length=group_by_length).epoch(0)
        return sum(max(len(rows[each[0]].ids) for each in step) * len(step) for step in steps)

    tokens = sum(len(r.ids) for r in rows)
    assert padded(True) < 1.15 * tokens
    assert padded(False) > 1.5 * tokens


def test_rows_stand_behind_each_other_with_positions_of_their_own() -> None:
    batch = flatten([row(3), row(5, supervised=2)])
    assert batch.input_ids.tolist() == [10, 11, 12, 10, 11, 12, 13, 14]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.row_lengths == (3, 5)
    assert batch.counted.tolist() == [1, 5, 6]
    assert batch.targets.tolist() == [12, 13, 14]
    assert batch.counted_rows == (1, 2)
    assert (batch.num_tokens, batch.num_counted) == (8, 3)
    assert batch.input_ids.dtype == torch.int64


def test_joined_batches_are_the_batch_of_all_rows() -> None:
    rows = [row(3), row(5, supervised=2), row(4)]
    whole, joined = flatten(rows), join([flatten(rows[:1]), flatten(rows[1:])])
    assert joined.row_lengths == whole.row_lengths
    assert joined.counted_rows == whole.counted_rows
    for name in ("input_ids", "position_ids", "counted", "targets"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


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
