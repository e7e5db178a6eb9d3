"""The sums of an experiment: wins, ties, what collapsed, what it cost, and what goes with a high lift."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lorafleet.experiment.heuristics import HEURISTICS
from lorafleet.experiment.line import Line

# A score that is lower by this much at most is not inferior.
NON_INFERIOR = 0.02
_LEAST_TASKS = 5

QUALITIES = (
    "average_base_score",
    "best_base_score",
    "average_lift",
    "average_adapter_score",
    "best_adapter_score",
)


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the sums over the lines that stand, as a JSON object; counts are kept apart by base."""
    stand = [line for line in lines if line.stands]
    scored = [line for line in stand if line.lift is not None]
    return {
        "runs": len(lines),
        "succeeded": sum(line.status == "succeeded" for line in lines),
        "collapsed": [line.key for line in lines if line.collapsed],
        "retried": [line.key for line in lines if line.retry_of],
        "failed": {line.key: line.error for line in lines if line.status != "succeeded"},
        "bases": {base: _of_base(of_base, scored) for base, of_base in _by(scored, "base").items()},
        "served_equals_trained": _agreement(scored),
        "unanswered_rows": sum(line.unanswered_rows for line in scored),
        "cost": {
            "trained_tokens": sum(line.trained_tokens or 0 for line in lines),
            "minutes": sum(line.minutes or 0.0 for line in lines),
            "adapter_bytes": sum(line.adapter_bytes or 0 for line in lines),
        },
    }


def settle(lines: Iterable[Line]) -> dict[str, str]:
    """Return which recipe stands for each collapsed run that was repeated, by the run's key.

    The second run stands where it came to an end and did not collapse too. Scores do not decide it: they are
    of test rows.
    """
    lines = list(lines)
    firsts = {line.key: line for line in lines}
    stands = {}
    for line in lines:
        if line.retry_of:
            first = firsts[f"{line.base}/{line.task}/{line.retry_of}"]
            better = line.status == "succeeded" and not line.collapsed
            stands[first.key] = line.recipe if better else first.recipe
    return stands


def correlations(lines: Sequence[Line], heuristics: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return Pearson's correlation of each heuristic with each quality, over the tasks.

    Args:
        heuristics: the fourteen figures of each task, by its name.

    None where a figure does not vary. `chance` is how far from 0 it comes by chance in one case in twenty
    (Fisher 1921: the inverse hyperbolic tangent of r is about normal, with variance 1 / (n - 3)).
    """
    qualities = _qualities([line for line in lines if line.stands and line.lift is not None])
    if len(qualities) < _LEAST_TASKS:
        return {"tasks": len(qualities), "chance": None, "pearson": {}}
    names = sorted(qualities)
    return {
        "tasks": len(names),
        "chance": math.tanh(1.96 / math.sqrt(len(names) - 3)),
        "pearson": {
            quality: {
                heuristic: pearson(
                    [heuristics[name][heuristic] for name in names],
                    [qualities[name][quality] for name in names],
                )
                for heuristic in HEURISTICS
            }
            for quality in QUALITIES
        },
    }


def pearson(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return Pearson's correlation; None where one side does not vary."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])


def _of_base(lines: Sequence[Line], every: Sequence[Line]) -> dict[str, Any]:
    lifts = [line.lift for line in lines if line.lift is not None]
    sides = [(line.adapter_score, line.base_score) for line in lines]
    return {
        "runs": len(lines),
        "mean_base": _mean([line.base_score for line in lines]),
        "mean_adapter": _mean([line.adapter_score for line in lines]),
        "mean_lift": _mean(lifts),
        "against_base": {
            **_wins(sides),
            "surely_above": sum((line.lift_low or 0.0) > 0 for line in lines),
            "surely_below": sum((line.lift_high or 0.0) < 0 for line in lines),
        },
        "against_majority": _against([(line, line.majority) for line in lines]),
        "against_naive_bayes": _against([(line, line.naive_bayes) for line in lines]),
        "best_of_all_bases_on": _best_on(lines, every),
    }


def _wins(sides: Sequence[tuple[float | None, float | None]]) -> dict[str, int]:
    """Count strict wins, ties and losses, and those that lose by `NON_INFERIOR` at most."""
    known = [(one, other) for one, other in sides if one is not None and other is not None]
    return {
        "strict_wins": sum(one > other for one, other in known),
        "ties": sum(one == other for one, other in known),
        "losses": sum(one < other for one, other in known),
        "not_inferior": sum(one >= other - NON_INFERIOR for one, other in known),
    }


def _against(pairs: Sequence[tuple[Line, float | None]]) -> dict[str, Any]:
    """Count wins over a trivial baseline, where a task states one."""
    known = [(line, baseline) for line, baseline in pairs if baseline is not None]
    return {
        "tasks": len(known),
        **_wins([(line.adapter_score, baseline) for line, baseline in known]),
        "surely_above": sum((line.adapter_low or 0.0) > baseline for line, baseline in known),
        "mean_difference": _mean([(line.adapter_score or 0.0) - baseline for line, baseline in known]),
    }


def _best_on(lines: Sequence[Line], every: Sequence[Line]) -> int:
    """Count the tasks on which no other base's adapter scores higher; 0 where there is one base only."""
    if len({line.base for line in every}) < 2:
        return 0
    best = {
        task: max(line.adapter_score or 0.0 for line in of_task)
        for task, of_task in _by(every, "task").items()
    }
    return sum((line.adapter_score or 0.0) >= best[line.task] for line in lines)


def _agreement(lines: Sequence[Line]) -> dict[str, Any]:
    measured = [line for line in lines if line.agrees is not None]
    gaps = [abs((line.trainer_adapter_score or 0.0) - (line.adapter_score or 0.0)) for line in measured]
    return {
        "runs": len(measured),
        "within_interval": sum(bool(line.agrees) for line in measured),
        "outside": [line.key for line in measured if not line.agrees],
        "largest_difference": max(gaps, default=None),
    }


def _qualities(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    found = {}
    for task, of_task in _by(lines, "task").items():
        base = [line.base_score or 0.0 for line in of_task]
        adapter = [line.adapter_score or 0.0 for line in of_task]
        mean_base, mean_adapter = sum(base) / len(base), sum(adapter) / len(adapter)
        figures = (mean_base, max(base), mean_adapter - mean_base, mean_adapter, max(adapter))
        found[task] = dict(zip(QUALITIES, figures, strict=True))
    return found


def _by(lines: Iterable[Line], field: str) -> dict[str, list[Line]]:
    groups = defaultdict(list)
    for line in lines:
        groups[str(getattr(line, field))].append(line)
    return dict(groups)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
