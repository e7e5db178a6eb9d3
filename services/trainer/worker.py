"""A worker: takes one job after the other and has a child process run it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from services.common.errors import Internal, LorafleetError, Unavailable
from services.trainer.book import Claim, JobBook
from services.trainer.child import JobProcess
from services.trainer.config import TrainerSettings
from services.trainer.failure import JobFailure
from services.trainer.index import Lane, StaleLeaseError
from services.trainer.job import Draft, Facts, JobState, Level
from services.trainer.link import FromChild, Order, Outcome
from services.trainer.validator import IDLE_SECONDS, RETRY_SECONDS, failed, wait_for

_logger = logging.getLogger("lorafleet.trainer.worker")

WATCH_SECONDS = 0.25


class Worker:
    """Runs the jobs of the training lane, one at a time, for as long as the service lives."""

    def __init__(self, book: JobBook, settings: TrainerSettings, in_work: set[str]) -> None:
        """Work on the jobs in `book`; `in_work` holds the ids that workers of this process are at."""
        self._book = book
        self._settings = settings
        self._in_work = in_work
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Have the job in work handed back, and take no other."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            claim = await self._next_claim()
            if claim is None:
                await wait_for(self._stopping, IDLE_SECONDS)
                continue
            self._in_work.add(claim.job.id)
            try:
                await self._work(claim)
            except StaleLeaseError:
                _logger.warning("job was taken over by another worker", extra={"job": claim.job.id})
            except Exception:
                _logger.exception("a job was dropped", extra={"job": claim.job.id})
                await wait_for(self._stopping, RETRY_SECONDS)
            finally:
                self._in_work.discard(claim.job.id)

    async def _next_claim(self) -> Claim | None:
        try:
            return await self._book.claim_next(Lane.TRAINING, passing_over=self._in_work)
        except Unavailable as error:
            _logger.warning("cannot look for jobs", extra={"reason": error.reason})
            return None

    async def _work(self, claim: Claim) -> None:
        """Take a job from where it stands to its end, or hand it back."""
        try:
            if await self._book.cancel_asked(claim.job.id):
                await self._append(claim, [Draft("Job cancelled", state=JobState.CANCELLED)])
            elif claim.job.crashes >= self._settings.max_crashes:
                await self._append(claim, [_given_up(claim.job.crashes)])
            else:
                await self._append(claim, [self._start_draft(claim)])
                await self._supervise(claim)
        finally:
            await self._release(claim)

    def _start_draft(self, claim: Claim) -> Draft:
        job = claim.job
        facts = Facts(claimed=True)
        if job.state is JobState.QUEUED:
            return Draft("Fine-tuning job started", state=JobState.RUNNING, facts=facts)
        step = job.checkpoints[-1].step if job.checkpoints else 0
        text = f"A worker takes the job up again at step {step}"
        return Draft(text, level=Level.WARN, data={"step": float(step)}, facts=facts)

    async def _supervise(self, claim: Claim) -> None:
        """Run a child to its end while keeping the lease and passing orders on."""
        child = await JobProcess.start(claim.job)
        _logger.info("job started", extra={"job": claim.job.id, "child_pid": child.pid})
        watch = asyncio.create_task(self._watch(claim, child))
        watch.add_done_callback(lambda _: child.kill())
        end: FromChild | None = None
        try:
            async for message in child.messages():
                if message.draft is None:
                    end = message
                    continue
                await self._append(claim, [message.draft])
                child.acknowledge(message.number)
            code = await child.wait()
            await self._close(claim, end, code)
        finally:
            watch.cancel()
            await asyncio.wait([watch])
            await child.wait()

    async def _watch(self, claim: Claim, child: JobProcess) -> None:
        """Renew the lease and pass on a cancel or the end of the service. The child dies with this task."""
        renewed = ordered = asyncio.get_running_loop().time()
        order: Order | None = None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = asyncio.get_running_loop().time()
            try:
                wanted = await self._wanted(claim)
                if now - renewed >= self._settings.lease_seconds / 4:
                    await self._book.renew(claim)
                    renewed = now
            except Unavailable:
                continue
            if wanted is not None and wanted is not order:
                order, ordered = wanted, now
                child.order(order)
            if order is not None and now - ordered >= self._grace_seconds(order):
                return

    async def _wanted(self, claim: Claim) -> Order | None:
        if await self._book.cancel_asked(claim.job.id):
            return Order.CANCEL
        return Order.HAND_BACK if self._stopping.is_set() else None

    def _grace_seconds(self, order: Order) -> float:
        cancel = order is Order.CANCEL
        return self._settings.cancel_grace_seconds if cancel else self._settings.grace_seconds

    async def _close(self, claim: Claim, end: FromChild | None, code: int) -> None:
        """Record how a child ended."""
        if claim.job.state.is_final:
            return
        outcome = end.outcome if end else None
        if await self._book.cancel_asked(claim.job.id) and outcome is not Outcome.SUCCEEDED:
            await self._append(claim, [Draft("Job cancelled", state=JobState.CANCELLED)])
        elif end is not None and end.failure is not None:
            await self._append(claim, [failed(end.failure)])
        elif outcome is Outcome.HANDED_BACK or self._stopping.is_set():
            await self._append(
                claim, [Draft("The trainer is stopping; the job waits", facts=Facts(released=True))]
            )
        else:
            text = f"The job's process ended without a word (exit code {code})"
            await self._append(claim, [Draft(text, level=Level.WARN, facts=Facts(crashed=True))])

    async def _append(self, claim: Claim, drafts: Sequence[Draft]) -> None:
        """Add to the job's history, waiting for store and index where they do not answer."""
        while True:
            try:
                await self._book.append(claim, drafts)
            except Unavailable as error:
                _logger.warning("cannot record", extra={"job": claim.job.id, "reason": error.reason})
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    async def _release(self, claim: Claim) -> None:
        try:
            await self._book.release(claim)
        except LorafleetError as error:
            # It ends by itself.
            _logger.warning("cannot release", extra={"job": claim.job.id, "reason": error.reason})


def _given_up(crashes: int) -> Draft:
    error = Internal(
        "worker_crashed",
        f"the job's process ended without a word {crashes} times in a row; it may need too much memory",
    )
    return failed(JobFailure.of(error))
