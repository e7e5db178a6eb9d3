"""Several jobs in one pass: each ends where it would have ended alone, whatever becomes of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.errors import FailedPrecondition
from services.trainer.spec import Schedule
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.loop import TrainingRun
from services.trainer.training.together import shared_pass
from tests.support.training import (
    Observer,
    StopRun,
    greatest_difference,
    load_shared,
    new_run,
    relative_difference,
    task_rows,
    tiny_spec,
    train_alone,
    weights_of,
)

TOLERANCE = 1e-5

# Four jobs that differ in everything that a job may choose.
JOBS: list[dict[str, Any]] = [
    {"method": "lora", "batch_size": 2, "n_epochs": 2},
    {
        "method": "rslora",
        "rank": 8,
        "batch_size": 1,
        "gradient_accumulation_steps": 4,
        "schedule": Schedule.LINEAR,
        "target_modules": ("q_proj", "v_proj"),
    },
    {"method": "dora", "batch_size": 3, "learning_rate": 0.003, "dropout": 0.2},
    {"method": "pissa", "batch_size": 1, "packing": True, "optimizer": "adamw_8bit", "weight_decay": 0.01},
]


@pytest.fixture(scope="module")
def base(nf4_base: BaseFolder) -> SharedBase:
    return load_shared(nf4_base)


@pytest.fixture
def start(base: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> Callable[..., TrainingRun]:
    """Begin the numbered job of `JOBS`."""

    def begin(number: int, name: str, stop_before: int | None = None) -> TrainingRun:
        observer = Observer(tmp_path / f"{name}-{number}", stop_before=stop_before)
        rows = task_rows(12 + 2 * number, offset=number)
        return new_run(base, tiny_spec(nf4_base, **JOBS[number]), observer, rows=rows, seed=20 + number)

    return begin


def train_together(runs: list[TrainingRun]) -> dict[int, Exception]:
    """Train until all runs are done or ended; return what ended them by their place."""
    ended: dict[int, Exception] = {}
    live = dict(enumerate(runs))
    while live := {number: run for number, run in live.items() if not run.is_done}:
        errors = shared_pass(runs[0].model.base, list(live.values()))
        ended |= {number: errors[run] for number, run in live.items() if run in errors}
        live = {number: run for number, run in live.items() if run not in errors}
    return ended


def alone(start: Callable[..., TrainingRun]) -> list[TrainingRun]:
    runs = [start(number, "alone") for number in range(4)]
    for run in runs:
        train_alone(run)
    return runs


def assert_same(one: TrainingRun, other: TrainingRun) -> None:
    assert relative_difference(weights_of(one), weights_of(other)) <= TOLERANCE
    assert [row.loss for row in one.state.figures] == pytest.approx(
        [row.loss for row in other.state.figures], rel=TOLERANCE
    )
    assert [row.gradient_norm for row in one.state.figures] == pytest.approx(
        [row.gradient_norm for row in other.state.figures], rel=1e-4
    )
    assert (one.state.step, one.state.trained_tokens) == (other.state.step, other.state.trained_tokens)


def test_four_jobs_together_end_as_alone(start: Callable[..., TrainingRun]) -> None:
    solo = alone(start)
    joint = [start(number, "joint") for number in range(4)]
    assert train_together(joint) == {}
    for one, other in zip(solo, joint, strict=True):
        assert_same(one, other)
        assert [row.valid_loss for row in one.state.figures if row.valid_loss] == pytest.approx(
            [row.valid_loss for row in other.state.figures if row.valid_loss], rel=TOLERANCE
        )
    assert len({run.state.step for run in joint}) > 1, "the jobs are of different length"


def test_cancelled_job_leaves_the_others_as_they_are(start: Callable[..., TrainingRun]) -> None:
    solo = alone(start)
    joint = [start(0, "joint"), start(1, "joint", stop_before=2), start(2, "joint"), start(3, "joint")]
    ended = train_together(joint)
    assert {number: type(error) for number, error in ended.items()} == {1: StopRun}
    for number in (0, 2, 3):
        assert_same(solo[number], joint[number])


def test_diverging_job_leaves_the_others_as_they_are(start: Callable[..., TrainingRun]) -> None:
    solo = alone(start)
    joint = [start(number, "joint") for number in range(4)]
    with torch.no_grad():
        next(iter(joint[2].model.adapter.parameters().values())).fill_(float("inf"))
    ended = train_together(joint)
    assert set(ended) == {2}
    error = ended[2]
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "diverged"
    for number in (0, 1, 3):
        assert_same(solo[number], joint[number])


def test_job_resumes_alone_from_a_checkpoint_made_together(
    start: Callable[..., TrainingRun], tmp_path: Path
) -> None:
    whole = start(0, "alone")
    train_alone(whole)
    joint = [start(0, "joint", stop_before=5), start(1, "joint")]
    assert isinstance(train_together(joint)[0], StopRun)
    resumed = start(0, "resumed")
    resumed.resume(tmp_path / "joint-0" / "step-3")
    assert resumed.state.step == 3
    train_alone(resumed)
    assert_same(whole, resumed)


def test_joint_pass_uses_the_base_once(base: SharedBase, start: Callable[..., TrainingRun]) -> None:
    runs = [start(number, "joint") for number in range(4)]
    widths: list[int] = []
    name = "model.layers.0.self_attn.q_proj"
    tokens = []
    handle = base.linears[name].register_forward_hook(
        lambda module, inputs, output: widths.append(inputs[0].shape[1])
    )
    try:
        tokens = [run.next_pass().num_tokens for run in runs]
        shared_pass(base, runs)
    finally:
        handle.remove()
    assert widths == [sum(tokens)]


def test_adapters_see_only_their_own_rows(base: SharedBase, start: Callable[..., TrainingRun]) -> None:
    """The gradient of a job's weights does not depend on who else is in the pass."""
    one = start(0, "one")
    shared_pass(base, [one])
    both = [start(0, "both"), start(1, "both")]
    shared_pass(base, both)
    assert greatest_difference(weights_of(one), weights_of(both[0])) < 1e-5
