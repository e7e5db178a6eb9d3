"""The child process that runs jobs: `python -m services.trainer.run_job`, started by a worker.

It reads the jobs from standard input, reports over standard output (see `link`), and dies with its worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from services.common import logs
from services.common.config import load
from services.trainer.config import TrainerSettings
from services.trainer.group import JobGroup, TogetherOutOfMemoryError
from services.trainer.link import WorkerGoneError, WorkerLink
from services.trainer.parent import die_with_parent

_logger = logging.getLogger("lorafleet.trainer.job")


def main() -> int:
    """Run the jobs on standard input; 0 where their outcomes were told, however they ended."""
    die_with_parent()
    settings = load(TrainerSettings)
    logs.configure("trainer-job", settings.log_level)
    os.nice(settings.niceness)
    torch.set_num_threads(settings.torch_threads)
    disable_progress_bar()
    link = WorkerLink()
    jobs = link.receive_jobs()
    with tempfile.TemporaryDirectory(prefix="lorafleet-job-", dir=settings.work_folder) as folder:
        group = JobGroup(jobs, settings, link.of, settings.open_store(), Path(folder))
        try:
            asyncio.run(group.run())
        except TogetherOutOfMemoryError:
            _logger.exception("out of memory with %d jobs", len(jobs))
            return 1
        except WorkerGoneError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
