"""A worker: takes jobs from the queue, those at once that can train together, and has a child run them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from services.common.errors import Internal, LorafleetError, Unavailable
from services.trainer.book import Claim, JobBook, paused
from services.trainer.child import JobProcess
from services.trainer.config import TrainerSettings
from services.trainer.crew import Crew
from services.trainer.failure import JobFailure
from services.trainer.index import Lane, StaleLeaseError
from services.trainer.job import Draft, Facts, Job, JobState, Level
from services.trainer.job_run import JobRun
from services.trainer.joining import Joining
from services.trainer.recording import append_patiently
from services.trainer.telemetry import JobMeasures
from services.trainer.validator import IDLE_SECONDS, RETRY_SECONDS, failed, wait_for

_logger = logging.getLogger("lorafleet.trainer.worker")


class Worker:
    """Runs the jobs of the training lane for as long as the service lives."""

    def __init__(
        self, book: JobBook, settings: TrainerSettings, in_work: set[str], measures: JobMeasures
    ) -> None:
        """Work on the jobs in `book`; `in_work` holds the ids that workers of this process are at."""
        self._book = book
        self._settings = settings
        self._in_work = in_work
        self._measures = measures
        self._stopping = asyncio.Event()
        self._held: set[str] = set()

    def stop(self) -> None:
        """Have the jobs in work handed back, and take no others."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            claims = await self._next_claims()
            if not claims:
                await wait_for(self._stopping, IDLE_SECONDS)
                continue
            self._held = {claim.job.id for claim in claims}
            self._in_work |= self._held
            try:
                await self._work(claims)
            except Exception:
                _logger.exception("jobs were dropped", extra={"jobs": sorted(self._held)})
                await wait_for(self._stopping, RETRY_SECONDS)
            finally:
                for claim in claims:
                    await self._let_go(claim)

    async def _next_claims(self) -> list[Claim]:
        """Take the oldest job that waits, and with it those that can train together with it."""
        claims: list[Claim] = []
        try:
            first = await self._book.claim_next(Lane.TRAINING, passing_over=self._in_work)
            if first is None:
                return claims
            claims.append(first)
            joining = Joining(first.job)
            if self._settings.joint_jobs > 1 and joining.is_open:
                claims += await self._book.claim_companions(
                    Lane.TRAINING,
                    passing_over={*self._in_work, first.job.id},
                    limit=self._settings.joint_jobs - 1,
                    suits=joining.suits,
                )
        except (StaleLeaseError, Unavailable) as error:
            _logger.warning("cannot look for jobs", extra={"reason": error.reason})
        return claims

    async def _work(self, claims: Sequence[Claim]) -> None:
        """Take jobs from where they stand to their ends, or hand them back."""
        started = []
        for claim in claims:
            if await self._starts(claim, len(claims)):
                started.append(claim)
            else:
                await self._let_go(claim)
        if started:
            runs = [JobRun(claim.job) for claim in started]
            child = await JobProcess.start(runs)
            ids = [claim.job.id for claim in started]
            _logger.info("jobs started", extra={"jobs": ids, "child_pid": child.pid})
            crew = Crew(
                self._book,
                self._settings,
                child,
                started,
                runs,
                stopping=self._stopping,
                measures=self._measures,
                let_go=self._let_go,
            )
            await crew.run()

    async def _starts(self, claim: Claim, num_jobs: int) -> bool:
        """Record that a job starts, or how it ends here; return whether it starts."""
        try:
            if await self._book.cancel_asked(claim.job.id):
                await append_patiently(self._book, claim, [Draft("Job cancelled", state=JobState.CANCELLED)])
            elif await self._book.pause_asked(claim.job):
                await append_patiently(self._book, claim, [paused()])
            elif claim.job.crashes >= self._settings.max_crashes:
                await append_patiently(self._book, claim, [_given_up(claim.job.crashes)])
            else:
                await append_patiently(self._book, claim, [_start_draft(claim.job, num_jobs)])
                return True
        except StaleLeaseError:
            _logger.warning("job was taken over by another worker", extra={"job": claim.job.id})
        return False

    async def _let_go(self, claim: Claim) -> None:
        """Give a job back to whoever wants it next; a second time does nothing."""
        if claim.job.id not in self._held:
            return
        self._held.discard(claim.job.id)
        self._in_work.discard(claim.job.id)
        try:
            await self._book.release(claim)
        except LorafleetError as error:
            # It ends by itself.
            _logger.warning("cannot release", extra={"job": claim.job.id, "reason": error.reason})


def _start_draft(job: Job, num_jobs: int) -> Draft:
    together = f", together with {num_jobs - 1} other jobs" if num_jobs > 1 else ""
    state = JobState.RUNNING if job.state is JobState.QUEUED else None
    facts = Facts(claimed=True)
    if not job.attempts:
        return Draft(f"Fine-tuning job started{together}", state=state, facts=facts)
    step = job.checkpoints[-1].step if job.checkpoints else 0
    text = f"A worker takes the job up again at step {step}{together}"
    level = Level.WARN if state is None else Level.INFO
    return Draft(text, level=level, state=state, data={"step": float(step)}, facts=facts)


def _given_up(crashes: int) -> Draft:
    error = Internal(
        "worker_crashed",
        f"the job's process ended without a word {crashes} times in a row; it may need too much memory",
    )
    return failed(JobFailure.of(error))
