"""A step that fails is run again in halves, so that only those sequences are lost that fail alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from services.inference.engine.batch import Batch
from services.inference.engine.scheduler import Chunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Computed:
    """A batch that has been run.

    Attributes:
        logits: [rows, vocabulary] float32.
        hidden: [rows, hidden] what the output head was given.
    """

    batch: Batch
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What of a step succeeded, and the chunks that failed even alone, each with its error."""

    computed: Sequence[Computed]
    failed: Sequence[tuple[Chunk, Exception]]


def run_isolated(
    chunks: Sequence[Chunk], run: Callable[[Sequence[Chunk]], Computed], recover: Callable[[], None]
) -> Outcome:
    """Run `chunks` together, and after a failure in halves. A chunk may be run again: it writes the same.

    `recover` is called after each failure; what it raises ends the step.
    """
    computed: list[Computed] = []
    failed: list[tuple[Chunk, Exception]] = []
    parts = [chunks]
    while parts:
        part = parts.pop()
        try:
            computed.append(run(part))
        except Exception as error:
            logger.exception("a step over %d sequences failed", len(part))
            recover()
            if len(part) == 1:
                failed.append((part[0], error))
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]
    return Outcome(computed, failed)
