"""Fourteen measures of how complex a task is, from its data alone (LoRA Land 2024, figure 8).

Lengths are in words and signs of punctuation, so that they do not depend on a tokenizer.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence

import numpy as np

from lorafleet.tasks import Row, Task
from services.common.scoring import Target, rouge_l

# More rows change the figures less than they cost.
_MOST_ROWS = 300
_WORD = re.compile(r"\w+|[^\w\s]")
_P95 = 95.0

HEURISTICS = (
    "input_length_p95",
    "input_length_mean",
    "input_length_std",
    "output_length_p95",
    "output_length_mean",
    "output_length_std",
    "example_length_mean",
    "example_length_p95",
    "example_length_std",
    "input_output_rouge_l_mean",
    "input_output_rouge_l_std",
    "compressibility_mean",
    "compressibility_std",
    "training_examples",
)


def heuristics_of(task: Task) -> dict[str, float]:
    """Return the fourteen figures of a task's training rows, by `HEURISTICS`.

    Compressibility is the share of an example's bytes that deflate saves, so it is higher for regular text.
    """
    rows = _some(task)
    inputs = [_words(row.prompt) for row in rows]
    outputs = [_words(row.target.completion) for row in rows]
    examples = [one + other for one, other in zip(inputs, outputs, strict=True)]
    similarity = [rouge_l(row.prompt, Target(row.target.completion))[0] for row in rows]
    saved = [_saved_share((row.prompt + row.target.completion).encode()) for row in rows]
    figures = {
        **_spread("input_length", inputs),
        **_spread("output_length", outputs),
        **_spread("example_length", examples),
        **_spread("input_output_rouge_l", similarity),
        **_spread("compressibility", saved),
        "training_examples": float(len(task.train)),
    }
    return {name: figures[name] for name in HEURISTICS}


def _some(task: Task) -> Sequence[Row]:
    if len(task.train) <= _MOST_ROWS:
        return task.train
    return random.Random(task.name).sample(task.train, _MOST_ROWS)  # noqa: S311 - a draw of rows, no secret


def _words(text: str) -> int:
    return len(_WORD.findall(text))


def _saved_share(data: bytes) -> float:
    return 1.0 - len(zlib.compress(data, 9)) / len(data)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_p95": float(np.percentile(values, _P95)),
        f"{name}_mean": float(np.mean(values)),
        f"{name}_std": float(np.std(values)),
    }
