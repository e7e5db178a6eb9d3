"""The jobs that one child process runs: their records, leases and orders, each apart from the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from services.common.errors import Unavailable
from services.trainer.book import Claim, JobBook, paused
from services.trainer.child import JobProcess
from services.trainer.config import TrainerSettings
from services.trainer.index import StaleLeaseError
from services.trainer.job import Draft, Facts, JobState, Level
from services.trainer.job_run import JobRun
from services.trainer.link import FromChild, Order, Outcome
from services.trainer.recording import append_patiently
from services.trainer.telemetry import JobMeasures
from services.trainer.validator import failed

_logger = logging.getLogger("lorafleet.trainer.worker")

WATCH_SECONDS = 0.25


class _Seat:
    """One job of the crew."""

    def __init__(self, claim: Claim, run: JobRun) -> None:
        self.claim = claim
        self.run = run
        self.order: Order | None = None
        self.ordered_at = 0.0
        self.is_closed = False

    @property
    def job_id(self) -> str:
        return self.claim.job.id


class Crew:
    """Runs a child to its end while keeping the leases of its jobs and passing orders on."""

    def __init__(
        self,
        book: JobBook,
        settings: TrainerSettings,
        child: JobProcess,
        claims: Sequence[Claim],
        runs: Sequence[JobRun],
        *,
        stopping: asyncio.Event,
        measures: JobMeasures,
        let_go: Callable[[Claim], Awaitable[None]],
    ) -> None:
        """Watch over `child`, which runs the jobs of `claims`.

        Args:
            book: where the records go.
            settings: lease and grace times.
            child: a process that was just started.
            claims: one for each job that it runs.
            runs: the spans of those jobs, in the same order; they end here.
            stopping: set when the service ends.
            measures: takes the figures of the steps.
            let_go: called with each claim once nothing more will be recorded by it.
        """
        self._book = book
        self._settings = settings
        self._child = child
        self._seats = {claim.job.id: _Seat(claim, run) for claim, run in zip(claims, runs, strict=True)}
        self._stopping = stopping
        self._measures = measures
        self._let_go = let_go
        self._is_killed = False

    async def run(self) -> None:
        """Return once every job's end is recorded and the child is gone."""
        watch = asyncio.create_task(self._watch())
        watch.add_done_callback(lambda _: self._child.kill())
        try:
            async for message in self._child.messages():
                await self._take(self._seats[message.job_id], message)
            code = await self._child.wait()
            for seat in self._open_seats():
                await self._close(seat, None, code)
        finally:
            watch.cancel()
            await asyncio.wait([watch])
            await self._child.wait()
            for seat in self._seats.values():
                self._measures.forget(seat.job_id)
                seat.run.ended(seat.claim.job)

    def _open_seats(self) -> list[_Seat]:
        return [seat for seat in self._seats.values() if not seat.is_closed]

    async def _take(self, seat: _Seat, message: FromChild) -> None:
        """Record what the child tells about a job."""
        if seat.is_closed:
            return
        if message.draft is None:
            await self._close(seat, message, 0)
            return
        try:
            await append_patiently(self._book, seat.claim, [message.draft])
        except StaleLeaseError:
            await self._lose(seat)
            return
        seat.run.recorded(message.draft)
        if message.draft.metrics is not None:
            self._measures.note(seat.claim.job, message.draft.metrics)
        self._child.acknowledge(seat.job_id, message.number)

    async def _lose(self, seat: _Seat) -> None:
        """Give a job up that another worker has taken over."""
        _logger.warning("job was taken over by another worker", extra={"job": seat.job_id})
        seat.is_closed = True
        self._measures.forget(seat.job_id)
        await self._let_go(seat.claim)
        if self._open_seats():
            self._child.order(seat.job_id, Order.DROP)
        else:
            self._child.kill()

    async def _watch(self) -> None:
        """Renew the leases and pass on wishes. The child dies with this task."""
        clock = asyncio.get_running_loop().time
        renewed = clock()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                is_due = clock() - renewed >= self._settings.lease_seconds / 4
                for seat in self._open_seats():
                    await self._look_after(seat, clock(), renew=is_due)
                renewed = clock() if is_due else renewed
            except Unavailable:
                continue
            if any(self._is_overdue(seat, clock()) for seat in self._open_seats()):
                self._is_killed = True
                return

    async def _look_after(self, seat: _Seat, now: float, *, renew: bool) -> None:
        wanted = await self._wanted(seat)
        try:
            if renew:
                await self._book.renew(seat.claim)
        except StaleLeaseError:
            await self._lose(seat)
            return
        if wanted is not None and wanted is not seat.order:
            seat.order, seat.ordered_at = wanted, now
            self._child.order(seat.job_id, wanted)

    async def _wanted(self, seat: _Seat) -> Order | None:
        if await self._book.cancel_asked(seat.job_id):
            return Order.CANCEL
        if self._stopping.is_set() or await self._book.pause_asked(seat.claim.job):
            return Order.HAND_BACK
        return None

    def _is_overdue(self, seat: _Seat, now: float) -> bool:
        """Return whether a job has not stopped within its time."""
        if seat.order is None:
            return False
        cancel = seat.order is Order.CANCEL
        grace = self._settings.cancel_grace_seconds if cancel else self._settings.grace_seconds
        return now - seat.ordered_at >= grace

    async def _close(self, seat: _Seat, end: FromChild | None, code: int) -> None:
        """Record how a job's run ended; `end` is None where the child told nothing."""
        draft = await self._end_draft(seat, end, code)
        try:
            if draft is not None:
                await append_patiently(self._book, seat.claim, [draft])
        except StaleLeaseError:
            _logger.warning("job was taken over by another worker", extra={"job": seat.job_id})
        seat.is_closed = True
        seat.run.ended(seat.claim.job)
        self._measures.forget(seat.job_id)
        self._measures.ended(seat.claim.job)
        if len(self._seats) == 1:
            await self._book.note_pace(seat.claim.job)
        await self._let_go(seat.claim)

    async def _end_draft(self, seat: _Seat, end: FromChild | None, code: int) -> Draft | None:
        job = seat.claim.job
        if job.state.is_final:
            return None
        outcome = end.outcome if end is not None else None
        if await self._book.cancel_asked(job.id) and outcome is not Outcome.SUCCEEDED:
            return Draft("Job cancelled", state=JobState.CANCELLED)
        if end is not None and end.failure is not None:
            return failed(end.failure)
        if await self._book.pause_asked(job):
            return paused()
        if outcome is Outcome.HANDED_BACK or self._stopping.is_set():
            return Draft("The trainer is stopping; the job waits", facts=Facts(released=True))
        if self._is_killed:
            text = (
                "Another job of the process did not stop in time; this one goes on from its last checkpoint"
            )
            return Draft(text, level=Level.WARN, facts=Facts(released=True))
        text = f"The job's process ended without a word (exit code {code})"
        return Draft(text, level=Level.WARN, facts=Facts(crashed=True))
