"""One run as a line of the experiment's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lorafleet.api import Json
from lorafleet.experiment.plan import Cell
from lorafleet.experiment.served import Reply
from services.common import scoring

_SECONDS_PER_MINUTE = 60.0
# An adapter that gives one answer to this share of the prompts or more has collapsed, unless the right
# answers are nearly as uniform.
_CONSTANT_SHARE = 0.95
_COMMON_TARGET_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Line:
    """One run. Scores are of the task's metric on the test rows; None where the run gave none.

    Attributes:
        status: `succeeded`, `failed`, `cancelled` or `refused`.
        base_score, adapter_score: of the served models' answers, each with its 95 % bootstrap interval.
        lift: the adapter's score minus the base's, with its interval drawn in pairs.
        trainer_base_score, trainer_adapter_score: as the trainer measured them on the same rows.
        collapsed: whether the adapter gives one and the same answer to prompts whose answers differ.
        retry_of: the recipe whose collapsed run this one repeats.
        stands: whether the sums count this line; of a collapsed run and its retry only one does.
        majority, naive_bayes: scores of trivial answers on the whole test file, where the task states them.
        unanswered_rows: test rows that the served models refused, for their length for instance.
        minutes: from the start of training to its end; runs that are trained together share them.
        adapter_bytes: of the published version's files.
    """

    base: str
    task: str
    recipe: str
    status: str
    metric: str
    base_score: float | None = None
    base_low: float | None = None
    base_high: float | None = None
    adapter_score: float | None = None
    adapter_low: float | None = None
    adapter_high: float | None = None
    lift: float | None = None
    lift_low: float | None = None
    lift_high: float | None = None
    trainer_base_score: float | None = None
    trainer_adapter_score: float | None = None
    collapsed: bool | None = None
    retry_of: str = ""
    stands: bool = True
    majority: float | None = None
    naive_bayes: float | None = None
    train_rows: int = 0
    test_rows: int = 0
    unanswered_rows: int = 0
    answer_tokens: int = 0
    trained_tokens: int | None = None
    minutes: float | None = None
    adapter_bytes: int | None = None
    model: str = ""
    error: str = ""

    @property
    def key(self) -> str:
        """The run's place in the experiment."""
        return f"{self.base}/{self.task}/{self.recipe}"

    @property
    def agrees(self) -> bool | None:
        """Whether the trainer's score of the adapter is within the served score's interval."""
        if self.trainer_adapter_score is None or self.adapter_low is None or self.adapter_high is None:
            return None
        return self.adapter_low <= self.trainer_adapter_score <= self.adapter_high


COLUMNS = tuple(field.name for field in fields(Line))


def line_of(
    cell: Cell,
    outcome: Json,
    base: Sequence[Reply] = (),
    adapter: Sequence[Reply] = (),
    *,
    adapter_bytes: int | None = None,
) -> Line:
    """Return the line of a run that has ended.

    Args:
        outcome: the job as the API shows it.
        base, adapter: the answers of the served models to the test rows; none where the run made no adapter.
    """
    facts = outcome.get("lorafleet") or {}
    began, ended = facts.get("started_at"), outcome.get("finished_at")
    return Line(
        base=cell.base,
        task=cell.task.name,
        recipe=cell.recipe_name,
        status=str(outcome.get("status") or "unknown"),
        metric=cell.task.metric.name,
        **_scores(cell, facts, base, adapter),
        retry_of=cell.retry_of,
        majority=cell.task.baselines.get("majority_label_accuracy"),
        naive_bayes=cell.task.baselines.get("word_naive_bayes_accuracy"),
        train_rows=len(cell.task.train),
        trained_tokens=outcome.get("trained_tokens"),
        minutes=None if began is None or ended is None else (ended - began) / _SECONDS_PER_MINUTE,
        adapter_bytes=adapter_bytes,
        model=str(outcome.get("fine_tuned_model") or ""),
        error=str((outcome.get("error") or {}).get("message") or ""),
    )


def has_collapsed(outcome: Json) -> bool:
    """Whether the trainer saw the run's adapter give one and the same answer to different prompts."""
    return bool((outcome.get("lorafleet") or {}).get("collapsed"))


def _scores(cell: Cell, facts: Json, base: Sequence[Reply], adapter: Sequence[Reply]) -> dict[str, Any]:
    measured: Mapping[str, Any] = next(
        (m for m in facts.get("evaluation") or () if m["name"] == cell.task.metric_name), {}
    )
    found: dict[str, Any] = {
        "trainer_base_score": measured.get("base_value"),
        "trainer_adapter_score": measured.get("adapter_value"),
    }
    if not adapter:
        return found
    metric, targets = cell.task.metric, [row.target for row in cell.task.test]
    before, after = [reply.text for reply in base], [reply.text for reply in adapter]
    for name, score in (
        ("base", scoring.score(metric, before, targets)),
        ("adapter", scoring.score(metric, after, targets)),
    ):
        found |= {f"{name}_score": score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    lift = scoring.lift(metric, before, after, targets)
    return found | {
        "lift": lift.value,
        "lift_low": lift.low,
        "lift_high": lift.high,
        "collapsed": bool(facts.get("collapsed"))
        or _is_constant(after, [target.completion for target in targets]),
        "test_rows": len(targets),
        "unanswered_rows": sum(
            bool(one.refusal or other.refusal) for one, other in zip(base, adapter, strict=True)
        ),
        "answer_tokens": sum(reply.tokens for reply in adapter),
    }


def _is_constant(answers: Sequence[str], targets: Sequence[str]) -> bool:
    return _commonest_share(answers) >= _CONSTANT_SHARE and _commonest_share(targets) <= _COMMON_TARGET_SHARE


def _commonest_share(texts: Sequence[str]) -> float:
    [(_, count)] = Counter(text.strip() for text in texts).most_common(1)
    return count / len(texts)
