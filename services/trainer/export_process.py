"""The child process that writes a checkpoint as an adapter and measures it, as the service sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from services.common.errors import Internal
from services.trainer.child import child_environment
from services.trainer.failure import JobFailure
from services.trainer.job import DatasetReport, EvaluationMetric, JobRequest
from services.trainer.parity import Probe

# What lies in the folder that both sides share.
REQUEST, CHECKPOINT, ADAPTER, ANSWER = "request.json", "checkpoint", "adapter", "answer.json"
_MODULE = "services.trainer.export_checkpoint"


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What the child is to do.

    Attributes:
        job: whose checkpoint it is.
        dataset: what the job's files, which lie in the folder by their ids, were found to be; the checkpoint
            is measured on them. None: there are none, and it is written only.
    """

    job: JobRequest
    dataset: DatasetReport | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written and measured.

    Attributes:
        conversion_error: the relative error of the published weight change against the trained one.
        evaluation: on the held-out rows.
        collapsed: as `Job.collapsed`.
        probes: what the model makes of a few rows, for the parity gate.
    """

    conversion_error: float
    evaluation: tuple[EvaluationMetric, ...] = ()
    collapsed: bool | None = None
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True, slots=True)
class ExportAnswer:
    """What the child tells: what it did, or why it could not."""

    exported: Exported | None = None
    failure: JobFailure | None = None


REQUEST_JSON: TypeAdapter[ExportRequest] = TypeAdapter(ExportRequest)
ANSWER_JSON: TypeAdapter[ExportAnswer] = TypeAdapter(ExportAnswer)


async def export(request: ExportRequest, folder: Path) -> Exported:
    """Have the weights in `folder / CHECKPOINT` written to `folder / ADAPTER` as what is published.

    Call it from the main thread: the kernel kills the child when the thread that started it ends.

    Raises:
        LorafleetError: what the child could not do.
        Internal: `export_failed`, where it ended without a word.
    """
    (folder / REQUEST).write_bytes(REQUEST_JSON.dump_json(request))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        _MODULE,
        str(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        env=child_environment(),
        start_new_session=True,
    )
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if code != 0:
        raise Internal(
            "export_failed", f"the checkpoint could not be written as an adapter (exit code {code})"
        )
    answer = ANSWER_JSON.validate_json((folder / ANSWER).read_bytes())
    if answer.failure is not None:
        raise answer.failure.to_error()
    assert answer.exported is not None, "the child tells one or the other"
    return answer.exported
