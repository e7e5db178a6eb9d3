"""What ends a run early: budgets, losses that grow, stale validation; and answers that are all alike."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from services.common.errors import FailedPrecondition
from services.common.prompts import PromptEncoder
from services.trainer.checkpoint_store import BEST
from services.trainer.dataset import PromptRow
from services.trainer.figures import StepFigures
from services.trainer.spec import Schedule
from services.trainer.tokens import TokenRow
from services.trainer.training import together
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.collapse import is_collapsed
from services.trainer.training.evaluate import evaluate
from services.trainer.training.guards import check_growth
from services.trainer.training.loss import token_losses
from services.trainer.training.validation import measure
from tests.support.training import (
    Observer,
    greatest_difference,
    load_shared,
    new_run,
    task_rows,
    tiny_spec,
    train_alone,
    weights_of,
)


@pytest.fixture(scope="module")
def base(nf4_base: BaseFolder) -> SharedBase:
    return load_shared(nf4_base)


def figures(losses: list[float]) -> list[StepFigures]:
    return [StepFigures(step, 1.0, loss, 1e-3, 1.0, 10) for step, loss in enumerate(losses, start=1)]


def test_token_budget_ends_the_run_with_a_checkpoint(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path
) -> None:
    observer = Observer(tmp_path)
    run = new_run(base, tiny_spec(nf4_base, token_budget=100, checkpoint_steps=1000), observer)
    with pytest.raises(FailedPrecondition) as caught:
        train_alone(run)
    assert (caught.value.reason, caught.value.field) == ("budget_exceeded", "spec.token_budget")
    assert run.state.trained_tokens >= 100
    assert run.state.trained_tokens - run.state.figures[-1].tokens < 100
    assert observer.checkpoints == [run.state.step]
    assert run.state.step < run.plan.total_steps


def test_budget_that_suffices_ends_nothing(base: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> None:
    tokens = 2 * sum(len(row.ids) for row in task_rows())
    run = new_run(base, tiny_spec(nf4_base, token_budget=tokens, minutes_budget=60.0), Observer(tmp_path))
    train_alone(run)
    assert run.state.trained_tokens == tokens


def test_minutes_count_over_attempts(base: SharedBase, nf4_base: BaseFolder, tmp_path: Path) -> None:
    first = new_run(base, tiny_spec(nf4_base), Observer(tmp_path))
    train_alone(first)
    spent = first.state.train_seconds / 60
    again = new_run(base, tiny_spec(nf4_base, minutes_budget=spent / 2), Observer(tmp_path / "again"))
    again.resume(tmp_path / "step-9")
    assert again.state.train_seconds > 60 * spent / 2
    # One more step was to come, so the budget does not matter any more.
    train_alone(again)
    small = new_run(base, tiny_spec(nf4_base, minutes_budget=spent / 10), Observer(tmp_path / "small"))
    small.resume(tmp_path / "step-3")
    with pytest.raises(FailedPrecondition) as caught:
        train_alone(small)
    assert (caught.value.reason, caught.value.field) == ("budget_exceeded", "spec.minutes_budget")


def test_early_stopping_ends_at_the_best_weights(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path
) -> None:
    """The held-out rows are of another task, so what is learned makes them worse before long."""
    observer = Observer(tmp_path)
    held_out = task_rows(8, offset=2)
    spec = tiny_spec(
        nf4_base,
        n_epochs=20,
        checkpoint_steps=2,
        early_stopping_patience=2,
        schedule=Schedule.CONSTANT,
    )
    run = new_run(base, spec, observer, validation_rows=held_out)
    train_alone(run)
    [(step, best_loss)] = observer.stopped
    assert step == run.state.step < run.plan.total_steps
    losses = [row.valid_loss for row in run.state.figures if row.valid_loss is not None]
    assert best_loss == min(losses)
    assert losses.index(best_loss) == len(losses) - 3
    assert measure(run.model, held_out, 4, check=lambda: None).loss == pytest.approx(best_loss, rel=1e-5)
    assert (tmp_path / f"step-{step}" / BEST).exists()

    again = new_run(base, spec, Observer(tmp_path / "again"), validation_rows=held_out)
    again.resume(tmp_path / f"step-{step}")
    assert again.is_done
    assert greatest_difference(weights_of(again), weights_of(run)) == 0.0


def test_loss_that_grows_far_beyond_its_beginning_is_divergence() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_growth(figures([2.0] * 10 + [1.0] * 20 + [9.0] * 10))
    assert caught.value.reason == "diverged"


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 10 + [0.001] * 10 + [0.1] * 10,
        [2.0] * 10 + [4.5] * 10,
        [2.0] * 15 + [50.0],
        [9.0] * 10,
    ],
)
def test_loss_that_wavers_is_none(losses: list[float]) -> None:
    check_growth(figures(losses))


def test_watchdog_stops_a_run_whose_loss_keeps_growing(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = itertools.count(1)

    def growing(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(logits, targets) * next(passes)

    monkeypatch.setattr(together, "token_losses", growing)
    run = new_run(base, tiny_spec(nf4_base, learning_rate=1e-6, n_epochs=20), Observer(tmp_path))
    with pytest.raises(FailedPrecondition) as caught:
        train_alone(run)
    assert caught.value.reason == "diverged"
    assert 20 <= run.state.step < 40


@pytest.mark.parametrize(
    ("answers", "references", "expected"),
    [
        (["yes"] * 20, ["yes", "no"] * 10, True),
        (["yes"] * 19 + ["no"], ["yes", "no"] * 10, True),
        ([" yes", "yes "] * 10, ["yes", "no"] * 10, True),
        (["yes", "no"] * 10, ["yes", "no"] * 10, False),
        (["yes"] * 18 + ["no"] * 2, ["yes", "no"] * 10, False),
        (["yes"] * 20, ["yes"] * 20, None),
        (["yes"] * 20, ["yes"] * 17 + ["no"] * 3, None),
        (["yes"] * 7, ["yes", "no", "a", "b", "c", "d", "e"], None),
    ],
)
def test_collapse(answers: list[str], references: list[str], expected: bool | None) -> None:
    assert is_collapsed(answers, references) is expected


def answered_rows(answers: list[int]) -> list[TokenRow]:
    """Rows with different prompts; the row's answer is the token of its place, over and over."""
    made = []
    for index in range(16):
        prompt = (40 + index, 60 + index, 40 + index)
        answer = answers[index % len(answers)]
        ids = (*prompt, answer, answer, 0)
        made.append(TokenRow(ids, (*[False] * 3, *[True] * 3), 3, PromptRow(index + 1, str(index), "c")))
    return made


@pytest.mark.parametrize(("taught", "collapsed"), [([70], True), ([70, 80], False)])
def test_evaluation_notices_that_a_model_answers_everything_alike(
    base: SharedBase, nf4_base: BaseFolder, tmp_path: Path, taught: list[int], collapsed: bool
) -> None:
    spec = tiny_spec(nf4_base, n_epochs=15, learning_rate=0.02)
    run = new_run(base, spec, Observer(tmp_path), rows=answered_rows(taught))
    train_alone(run)
    encoder = PromptEncoder.load(nf4_base.path)
    held_out = answered_rows([70, 80])
    measured = evaluate(run.model, held_out, encoder, spec, seed=1, check=lambda: None)
    assert measured.collapsed is collapsed
    assert [figure.name for figure in measured.figures] == ["loss", "token_accuracy"]
