"""Jobs of one base in one process: they share the base and its forward passes, and nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import torch

from services.common.call_context import call_scope
from services.common.errors import Internal, LorafleetError, ResourceExhausted
from services.common.failpoints import failpoint
from services.common.store import ObjectStore
from services.common.telemetry import child_of
from services.trainer.config import TrainerSettings
from services.trainer.failure import JobFailure
from services.trainer.job import Job
from services.trainer.link import JobLine, Outcome, WorkerGoneError
from services.trainer.pipeline import Pipeline
from services.trainer.registry_client import RegistryClient
from services.trainer.reporter import Interrupted, RunReporter
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.loop import TrainingRun
from services.trainer.training.together import shared_pass
from services.trainer.workspace import storage_full

_logger = logging.getLogger("lorafleet.trainer.job")


class TogetherOutOfMemoryError(Exception):
    """Several jobs together need more memory than there is. Each may still fit alone, so none has failed."""


class JobGroup:
    """Runs jobs of one base to their ends, each of which is told to the worker as it comes."""

    def __init__(
        self,
        jobs: Sequence[Job],
        settings: TrainerSettings,
        line_of: Callable[[str], JobLine],
        store: ObjectStore,
        folder: Path,
    ) -> None:
        """Prepare to run `jobs`; `folder` is empty and goes away with the process."""
        assert len({job.request.base_model for job in jobs}) == 1, "the jobs share a base"
        self._settings = settings
        self._lines = {job.id: line_of(job.id) for job in jobs}
        self._store = store
        self._folder = folder
        self._jobs = list(jobs)
        self._live: dict[str, Pipeline] = {}
        self._runs: dict[str, TrainingRun] = {}

    async def run(self) -> None:
        """Run every job to its end.

        Raises:
            TogetherOutOfMemoryError: memory was short while several jobs were in work.
        """
        registry = RegistryClient(self._settings.registry_target, self._settings.peer_tls)
        try:
            for job in self._jobs:
                pipeline = self._pipeline(job, registry)
                self._live[job.id] = pipeline
                await self._stage(job.id, pipeline.prepare)
            await self._begin()
            while self._runs:
                for job_id, error in (await asyncio.to_thread(self._train)).items():
                    if error is not None:
                        self._end(job_id, error)
                        continue
                    await self._stage(job_id, self._live[job_id].conclude)
                    if job_id in self._live:
                        self._tell(job_id, Outcome.SUCCEEDED)
        finally:
            await registry.close()

    def _pipeline(self, job: Job, registry: RegistryClient) -> Pipeline:
        folder = self._folder / job.id
        folder.mkdir()
        reporter = RunReporter(job, self._settings, self._lines[job.id], self._store, folder)
        return Pipeline(reporter, self._settings, registry, folder)

    async def _begin(self) -> None:
        """Load the base, and have every job begin on it."""
        if not self._live:
            return
        name = self._jobs[0].request.base_model
        folder = BaseFolder(name, self._settings.bases[name], self._settings.base_quantization)
        device = torch.device(self._settings.device_type)
        failpoint("base.before_load")
        base = await asyncio.to_thread(SharedBase.load, folder, device)
        failpoint("base.after_load")
        for job_id, pipeline in list(self._live.items()):

            async def begin(job_id: str = job_id, pipeline: Pipeline = pipeline) -> None:
                self._runs[job_id] = await asyncio.to_thread(pipeline.begin, base)

            await self._stage(job_id, begin)

    def _train(self) -> dict[str, Exception | None]:
        """Train until at least one run is over; return those, with what ended them before their last step."""
        while True:
            done: dict[str, Exception | None] = {
                job_id: None for job_id, run in self._runs.items() if run.is_done
            }
            if not done:
                runs = list(self._runs.values())
                try:
                    ended = shared_pass(runs[0].model.base, runs)
                except Exception as error:  # noqa: BLE001 - what fails in the shared part ends all; `_end` tells how
                    ended = dict.fromkeys(runs, error)
                done = {job_id: ended[run] for job_id, run in self._runs.items() if run in ended}
            if done:
                for job_id in done:
                    del self._runs[job_id]
                return done

    async def _stage(self, job_id: str, stage: Callable[[], Awaitable[None]]) -> None:
        """Do a stage of one job; a failure ends that job alone."""
        tenant = self._live[job_id].job.request.tenant
        try:
            with call_scope(tenant=tenant, request_id=job_id), child_of(self._lines[job_id].traceparent):
                await stage()
        except Exception as error:  # noqa: BLE001 - `_end` tells what it means
            self._end(job_id, error)

    def _end(self, job_id: str, error: Exception) -> None:
        """Tell how a job ended that did not succeed."""
        if isinstance(error, WorkerGoneError):
            del self._live[job_id]
        elif isinstance(error, Interrupted):
            self._tell(job_id, error.outcome)
        elif isinstance(error, LorafleetError):
            self._tell(job_id, Outcome.FAILED, error)
        elif (full := storage_full(error)) is not None:
            self._tell(job_id, Outcome.FAILED, full)
        elif _is_memory(error):
            if len(self._live) > 1:
                raise TogetherOutOfMemoryError from error
            _logger.error("out of memory", exc_info=error)
            self._tell(job_id, Outcome.FAILED, _out_of_memory())
        else:
            _logger.error("the job failed for a reason of ours", exc_info=error)
            text = "the job failed for a reason that is not yours; the log has it"
            self._tell(job_id, Outcome.FAILED, Internal("internal", text))

    def _tell(self, job_id: str, outcome: Outcome, error: LorafleetError | None = None) -> None:
        del self._live[job_id]
        try:
            self._lines[job_id].finish(outcome, None if error is None else JobFailure.of(error))
        except WorkerGoneError:
            _logger.warning("nobody is left to tell the end of a job to", extra={"job": job_id})


def _is_memory(error: Exception) -> bool:
    # On a CPU torch raises a plain RuntimeError with the allocator's text.
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text
    )


def _out_of_memory() -> ResourceExhausted:
    return ResourceExhausted(
        "out_of_memory",
        "the job needs more memory than there is; lower batch_size or max_seq_len, raise"
        " gradient_accumulation_steps instead, or set gradient_checkpointing",
        final=True,
    )
