"""The child process that runs one job: `python -m services.trainer.run_job`, started by a worker.

It reads the job from standard input, reports over standard output (see `link`), and dies with its worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from services.common import logs
from services.common.call_context import call_scope
from services.common.config import load
from services.common.errors import Internal, LorafleetError, ResourceExhausted
from services.trainer.child import PARENT_VARIABLE
from services.trainer.config import TrainerSettings
from services.trainer.failure import JobFailure
from services.trainer.job import Job
from services.trainer.link import Outcome, WorkerGoneError, WorkerLink
from services.trainer.pipeline import Interrupted, Pipeline

_logger = logging.getLogger("lorafleet.trainer.job")
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run the job on standard input; 0 where its outcome was told, however it ended."""
    _die_with_worker()
    settings = load(TrainerSettings)
    logs.configure("trainer-job", settings.log_level)
    os.nice(settings.niceness)
    torch.set_num_threads(settings.torch_threads)
    disable_progress_bar()
    link = WorkerLink()
    job = link.receive_job()
    try:
        outcome, failure = _run(job, settings, link)
        link.finish(outcome, failure)
    except WorkerGoneError:
        return 1
    return 0


def _run(job: Job, settings: TrainerSettings, link: WorkerLink) -> tuple[Outcome, JobFailure | None]:
    try:
        with (
            tempfile.TemporaryDirectory(prefix="lorafleet-job-", dir=settings.work_folder) as folder,
            call_scope(tenant=job.request.tenant, request_id=job.id),
        ):
            asyncio.run(_pipeline(job, settings, link, Path(folder)).run())
    except Interrupted as interruption:
        return interruption.outcome, None
    except WorkerGoneError:
        raise
    except LorafleetError as error:
        return Outcome.FAILED, JobFailure.of(error)
    except (MemoryError, torch.OutOfMemoryError):
        _logger.exception("out of memory")
        return Outcome.FAILED, JobFailure.of(_out_of_memory())
    except Exception:
        _logger.exception("the job failed for a reason of ours")
        ours = Internal("internal", "the job failed for a reason that is not yours; the log has it")
        return Outcome.FAILED, JobFailure.of(ours)
    return Outcome.SUCCEEDED, None


def _pipeline(job: Job, settings: TrainerSettings, link: WorkerLink, folder: Path) -> Pipeline:
    return Pipeline(job, settings, link, settings.open_store(), folder)


def _out_of_memory() -> ResourceExhausted:
    return ResourceExhausted(
        "out_of_memory",
        "the job needs more memory than there is; lower batch_size or max_seq_len, raise"
        " gradient_accumulation_steps instead, or set gradient_checkpointing",
        final=True,
    )


def _die_with_worker() -> None:
    """Have the kernel kill this process when its worker ends; end at once if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
