"""What ends a run before its last step: losses that grow, spent budgets, validation that stands still."""

from __future__ import annotations

from collections.abc import Sequence

from services.common.errors import FailedPrecondition
from services.trainer.figures import StepFigures
from services.trainer.spec import TrainingSpec
from services.trainer.training.checkpoint import RunState

BAD_STEPS_LIMIT = 3
# Mean losses over this many steps are compared.
WATCHED_STEPS = 10
# A run has diverged where that mean is this many times what it was at first, and this many nats more.
LOSS_FACTOR = 2.0
LOSS_MARGIN_NATS = 1.0
# A lower validation loss counts from this share of it on.
LEAST_IMPROVEMENT = 1e-4


def check_finite(state: RunState) -> None:
    """Raise `FailedPrecondition` (`diverged`) after `BAD_STEPS_LIMIT` bad steps in a row."""
    if state.bad_steps >= BAD_STEPS_LIMIT:
        raise FailedPrecondition(
            "diverged",
            f"the loss or its gradient was not finite in {BAD_STEPS_LIMIT} steps in a row, up to step"
            f" {state.step}; lower learning_rate or max_grad_norm",
            final=True,
        )


def check_growth(figures: Sequence[StepFigures]) -> None:
    """Raise `FailedPrecondition` (`diverged`) where the loss has grown far above what it began at."""
    if len(figures) < 2 * WATCHED_STEPS:
        return
    first = _mean_loss(figures[:WATCHED_STEPS])
    last = _mean_loss(figures[-WATCHED_STEPS:])
    limit = LOSS_FACTOR * first + LOSS_MARGIN_NATS
    if last > limit:
        raise FailedPrecondition(
            "diverged",
            f"the mean loss of the last {WATCHED_STEPS} steps, up to step {figures[-1].step}, is"
            f" {last:.3g}; it began at {first:.3g}, and {limit:.3g} is too much; lower learning_rate",
            final=True,
        )


def spent_budget(state: RunState, spec: TrainingSpec) -> FailedPrecondition | None:
    """Return the error (`budget_exceeded`) that ends a run whose tokens or minutes are spent, or None."""
    minutes = state.train_seconds / 60
    for name, spent, limit in (
        ("token_budget", state.trained_tokens, spec.token_budget),
        ("minutes_budget", minutes, spec.minutes_budget),
    ):
        if limit and spent >= limit:
            return FailedPrecondition(
                "budget_exceeded",
                f"{spent:g} of {limit:g} ({name}) were spent at step {state.step}; the last checkpoint holds"
                " what was trained",
                field=f"spec.{name}",
                value=f"{spent:g}",
                limit=f"{limit:g}",
                final=True,
            )
    return None


def improves(valid_loss: float, best: float | None) -> bool:
    """Whether a validation loss is lower than the lowest before it, by more than noise."""
    return best is None or valid_loss < best * (1 - LEAST_IMPROVEMENT)


def _mean_loss(figures: Sequence[StepFigures]) -> float:
    return sum(row.loss for row in figures) / len(figures)
