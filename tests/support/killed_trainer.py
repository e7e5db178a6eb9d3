"""A trainer whose job processes end by SIGKILL at places drawn at random.

The service itself ends where `LORAFLEET_FAILPOINT` says, as any service does. Its children end at places
drawn from `PLACES` with the seed in `KILLS_SEED`; each that did so is a line in the file `KILLS_LOG`. Without
that file none is killed.

    python -m tests.support.killed_trainer
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from services.common.failpoints import VARIABLE
from services.trainer import child, worker
from services.trainer.__main__ import main
from services.trainer.job_run import JobRun

# Where a job's process ends, and the most visits of the place before that.
PLACES = {
    "tokens.before_download": 1,
    "tokens.after_write": 1,
    "base.before_load": 1,
    "base.after_load": 1,
    "step.before": 12,
    "checkpoint.before_write": 2,
    "checkpoint.before_upload": 2,
    "checkpoint.before_manifest": 2,
    "checkpoint.before_record": 2,
    "checkpoint.after_record": 2,
    "evaluate.before_record": 1,
    "publish.before_call": 1,
    "publish.after_call": 1,
    "report.after_record": 1,
}
# One attempt in so many is left alone, so that jobs end.
SPARED = 5


class KilledJobProcess(child.JobProcess):
    """A job's process that ends at a place of its own."""

    _draw = random.Random(int(os.environ.get("KILLS_SEED", "0")))
    rule = ""

    @classmethod
    async def start(cls, runs: Sequence[JobRun]) -> Self:
        place, visits = cls._draw.choice(list(PLACES.items()))
        spared = cls._draw.randrange(SPARED) == 0 or "KILLS_LOG" not in os.environ
        rule = "" if spared else f"{place}=kill:{cls._draw.randint(1, visits)}"
        # Read by the child alone: this process has armed what it was started with.
        os.environ[VARIABLE] = rule
        process = await super().start(runs)
        process.rule = rule
        return process

    async def wait(self) -> int:
        code = await super().wait()
        if code == -signal.SIGKILL and self.rule:
            _log_kill(self.rule)
            self.rule = ""
        return code


def _log_kill(rule: str) -> None:
    with Path(os.environ["KILLS_LOG"]).open("a", encoding="ascii") as log:
        log.write(rule + "\n")


if __name__ == "__main__":
    worker.JobProcess = KilledJobProcess  # type: ignore[attr-defined]
    sys.exit(asyncio.run(main()))
