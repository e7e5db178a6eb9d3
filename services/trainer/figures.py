"""The figures of a run's steps, and the file that they are handed out in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

# Held-out rows whose loss is measured at each checkpoint.
CHECKPOINT_VALIDATION_ROWS = 32
_COLUMNS = (
    "step",
    "epoch",
    "train_loss",
    "learning_rate",
    "gradient_norm",
    "tokens",
    "valid_loss",
    "valid_mean_token_accuracy",
)


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One row of the metrics file."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None


def metrics_csv(figures: Sequence[StepFigures]) -> bytes:
    """Return the figures of every step as CSV, with empty cells where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in figures:
        cells = (
            row.step,
            row.epoch,
            row.loss,
            row.learning_rate,
            row.gradient_norm,
            row.tokens,
            row.valid_loss,
            row.valid_accuracy,
        )
        writer.writerow("" if cell is None else f"{cell:.8g}" for cell in cells)
    return text.getvalue().encode("ascii")
