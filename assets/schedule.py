"""The pretraining plan: learning rate, batch shape and mixture as functions of a stage's progress."""

from __future__ import annotations

from dataclasses import dataclass

WARMUP_STEPS = 60
DECAY_FROM = 0.75
LONG_ROWS_FROM = 0.85
SHORT_ROW_TOKENS = 256
LONG_ROW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the pretraining, with a learning rate that rises and falls once.

    Attributes:
        stable_mix, decay_mix: the streams' chances for each row, before and after `DECAY_FROM`.
        after: the stage whose weights and moments this one begins with; None: fresh weights.
    """

    name: str
    stable_mix: dict[str, float]
    decay_mix: dict[str, float]
    after: str | None = None


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="reading",
            stable_mix={"children": 0.30, "fiction": 0.15, "instructions": 0.38, "echoes": 0.17},
            decay_mix={"children": 0.43, "fiction": 0.10, "instructions": 0.43, "echoes": 0.04},
        ),
        Stage(
            name="copying",
            after="reading",
            stable_mix={"children": 0.15, "copies": 0.40, "echoes": 0.45},
            decay_mix={
                "children": 0.40,
                "fiction": 0.10,
                "instructions": 0.30,
                "copies": 0.18,
                "echoes": 0.02,
            },
        ),
    )
}


def learning_rate_factor(step: int, progress: float) -> float:
    """Warmup, stable, decay: linear up over `WARMUP_STEPS`, then 1, then linear to 0 from `DECAY_FROM` on.

    `progress` is the done share of the stage, 0 to 1. See Hu et al. 2024, MiniCPM, section 4 (WSD schedule).
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))
    return warmup * max(0.0, decay)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What one step reads: `rows` x `row_tokens` token ids, each row from a stream drawn by `mix`."""

    rows: int
    row_tokens: int
    mix: dict[str, float]


def batch_plan(stage: Stage, progress: float, batch_tokens: int) -> BatchPlan:
    """Short rows first; the last part of the stage reads rows of the whole context, and more instructions."""
    assert batch_tokens % LONG_ROW_TOKENS == 0, batch_tokens
    row_tokens = LONG_ROW_TOKENS if progress >= LONG_ROWS_FROM else SHORT_ROW_TOKENS
    mix = stage.decay_mix if progress >= DECAY_FROM else stage.stable_mix
    return BatchPlan(batch_tokens // row_tokens, row_tokens, mix)
