"""The book of jobs: the journal, which is the truth, and the index, which is kept in step with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from services.common.errors import Aborted, FailedPrecondition
from services.common.failpoints import failpoint
from services.trainer.index import JobIndex, JobView, Lane, StaleLeaseError, claim_text
from services.trainer.job import (
    Draft,
    Estimate,
    Facts,
    Job,
    JobRequest,
    JobState,
    Publication,
    Record,
    job_not_found,
)
from services.trainer.journal import History, Journal
from services.trainer.lease import Holder, Lease

_logger = logging.getLogger("lorafleet.trainer.book")

# How long a request may take to be stored; after that a retry with its idempotency key does it over.
CREATE_SECONDS = 30.0
_SCAN_ROWS = 200

Matches = Callable[[JobView], bool]


@dataclass(slots=True)
class Claim:
    """A job in the hands of this process, with the lease that lets it write."""

    lease: Lease
    job: Job


class JobBook:
    """Creates, finds and changes jobs. Any call may raise `Unavailable` (`store_unavailable`)."""

    def __init__(self, journal: Journal, index: JobIndex, holder: Holder) -> None:
        self._journal = journal
        self._index = index
        self._holder = holder
        self._rebuilding = asyncio.Lock()

    async def ensure_indexed(self) -> None:
        """Rebuild the index from the journal where it has lost its data; do nothing otherwise."""
        if await self._index.is_complete():
            return
        async with self._rebuilding:
            if await self._index.is_complete():
                return
            job_ids = await asyncio.to_thread(lambda: list(self._journal.job_ids()))
            for job_id in job_ids:
                await self._reindex(job_id)
            await self._index.mark_complete()
            _logger.info("index rebuilt", extra={"jobs": len(job_ids)})

    async def create(self, request: JobRequest, *, message: str, estimate: Estimate | None = None) -> Job:
        """Store a new job in state VALIDATING_FILES; return the first job where the idempotency key is known.

        Raises:
            FailedPrecondition: `idempotency_key_reused` for another request under the same key.
            Aborted: `request_in_progress` while the same request is being stored.
        """
        facts = None if estimate is None else Facts(estimate=estimate)
        first = Draft(message, state=JobState.VALIDATING_FILES, facts=facts)
        claim = claim_text(request.request_digest, request.id, request.create_time)
        if not request.idempotency_key:
            return await self._store_new(request, first)
        bound = await self._index.reserve(request.tenant, request.idempotency_key, claim)
        if bound is not None:
            known = await self._known(request, bound)
            if known is not None:
                return known
            return await self._store_new(_renamed(request, bound.split(" ")[1]), first)
        try:
            return await self._store_new(request, first)
        except BaseException:
            await self._index.unreserve(request.tenant, request.idempotency_key, claim)
            raise

    async def get(self, tenant: str, job_id: str) -> JobView:
        """Return a job of a tenant; raise `NotFound` (`job_not_found`) where it has none of this id."""
        await self.ensure_indexed()
        view = await self._index.get(job_id)
        if view is None or view.job.request.tenant != tenant:
            raise job_not_found(job_id)
        return view

    async def newest(
        self, tenant: str, *, before: str | None, limit: int, matches: Matches
    ) -> tuple[list[JobView], bool]:
        """Return up to `limit` matching jobs older than `before`, newest first, and if there are more."""
        await self.ensure_indexed()
        found: list[JobView] = []
        while True:
            ids = await self._index.newest(tenant, before=before, limit=_SCAN_ROWS)
            for view in await self._index.get_many(ids):
                if matches(view):
                    if len(found) == limit:
                        return found, True
                    found.append(view)
            if len(ids) < _SCAN_ROWS:
                return found, False
            before = ids[-1]

    async def records(self, job: Job, first: int, last: int) -> list[Record]:
        """Return records `first` to `last` of a job, so far as they exist."""
        return await self._index.records(job.id, first, last)

    async def publications(self, job: Job) -> list[Publication]:
        """Return what the job's checkpoints were published as, apart from its own version; oldest first."""
        return sorted(await self._index.publications(job.id), key=lambda publication: publication.time)

    async def add_publication(self, job: Job, publication: Publication) -> None:
        """Add to what the job's checkpoints were published as; its worker, if any, is not disturbed."""
        await asyncio.to_thread(self._journal.add_publication, job.id, publication)
        await self._index.add_publication(job.id, publication)

    async def ask_cancel(self, tenant: str, job_id: str) -> JobView:
        """Have a job cancelled and return it: CANCELLED where nobody works on it, CANCELLING otherwise.

        Raises:
            NotFound: `job_not_found`.
            FailedPrecondition: `already_finished`, where it succeeded or failed.
        """
        view = await self.get(tenant, job_id)
        if view.job.state is JobState.CANCELLED:
            return view
        if view.job.state.is_final:
            raise _already_finished(view.job, "cancelled")
        if not view.cancel_asked:
            await asyncio.to_thread(self._journal.ask_cancel, job_id)
            await self._index.ask_cancel(job_id)
        claim = await self.claim(job_id)
        if claim is not None:
            try:
                await self.append(claim, [Draft("Job cancelled", state=JobState.CANCELLED)])
            finally:
                await self.release(claim)
        return await self.get(tenant, job_id)

    async def ask_pause(self, tenant: str, job_id: str) -> JobView:
        """Have a job paused and return it: PAUSED where nobody works on it, as it stands otherwise.

        Raises:
            NotFound: `job_not_found`.
            FailedPrecondition: `already_finished`.
        """
        view = await self.get(tenant, job_id)
        if view.job.state is JobState.PAUSED:
            return view
        if view.job.state.is_final:
            raise _already_finished(view.job, "paused")
        if not view.pause_asked:
            sequence = view.job.last_sequence
            await asyncio.to_thread(self._journal.ask_pause, job_id, sequence)
            await self._index.ask_pause(job_id, sequence)
        claim = await self.claim(job_id)
        if claim is not None:
            try:
                if claim.job.state in (JobState.QUEUED, JobState.RUNNING):
                    await self.append(claim, [paused()])
            finally:
                await self.release(claim)
        return await self.get(tenant, job_id)

    async def resume(self, tenant: str, job_id: str) -> JobView:
        """Put a job that is paused, or failed for want of room or memory, back in its queue and return it.

        Raises:
            NotFound: `job_not_found`.
            FailedPrecondition: `not_paused`, `already_finished`.
            Aborted: `request_in_progress`, where somebody else changes the job at this moment.
        """
        view = await self.get(tenant, job_id)
        if view.job.state.is_final and not view.job.is_resumable:
            raise _already_finished(view.job, "resumed")
        if not view.job.is_resumable:
            wait = "; it is still stopping" if view.pause_asked else ""
            raise FailedPrecondition(
                "not_paused", f"the job is {view.state}, not paused{wait}", resource=f"jobs/{job_id}"
            )
        claim = await self.claim(job_id, ended=True)
        if claim is None:
            raise Aborted("request_in_progress", "the job is being changed", retry_after_seconds=1.0)
        try:
            if claim.job.is_resumable:
                await self.append(claim, [Draft("Job resumed: it waits for a worker", state=JobState.QUEUED)])
        finally:
            await self.release(claim)
        return await self.get(tenant, job_id)

    async def pause_asked(self, job: Job) -> bool:
        """Return whether a job is to be paused and is not yet."""
        return await self._index.pause_asked_at(job.id) > job.paused_at

    async def note_pace(self, job: Job) -> None:
        """Keep how fast a job trained that had its process for itself, for the estimates of others."""
        if job.progress is not None:
            await self._index.note_pace(job.request.base_model, job.progress.tokens_per_second)

    async def cancel_asked(self, job_id: str) -> bool:
        """Return whether a job is to be cancelled."""
        return await self._index.cancel_asked(job_id)

    async def claim_next(self, lane: Lane, *, passing_over: Collection[str]) -> Claim | None:
        """Take the oldest job of a lane that nobody works on, or None."""
        await self.ensure_indexed()
        for job_id in await self._index.waiting(lane):
            if job_id not in passing_over:
                claim = await self.claim(job_id)
                if claim is not None:
                    return claim
        return None

    async def claim_companions(
        self, lane: Lane, *, passing_over: Collection[str], limit: int, suits: Callable[[Job], bool]
    ) -> list[Claim]:
        """Take up to `limit` more jobs of a lane, oldest first, that are free and that `suits` takes."""
        claims: list[Claim] = []
        waiting = [job_id for job_id in await self._index.waiting(lane) if job_id not in passing_over]
        for view in await self._index.get_many(waiting[:_SCAN_ROWS]):
            if len(claims) == limit:
                break
            if not suits(view.job) or (claim := await self.claim(view.job.id)) is None:
                continue
            if suits(claim.job):
                claims.append(claim)
            else:
                await self.release(claim)
        return claims

    async def claim(self, job_id: str, *, ended: bool = False) -> Claim | None:
        """Take a job for writing, or return None where it is taken or has ended; with `ended`, those as well.

        What is stored counts, not what is indexed: the last holder may have died between the two.
        """
        lease = await self._index.claim(job_id, self._holder)
        if lease is None:
            return None
        history = await self._reindex(job_id)
        if history is None or (history.job.state.is_final and not ended):
            await self._index.release(lease)
            return None
        return Claim(lease, history.job)

    async def renew(self, claim: Claim) -> None:
        """Extend the lease; raise `StaleLeaseError` where another process has taken the job over."""
        await self._index.renew(claim.lease)

    async def release(self, claim: Claim) -> None:
        """Give the lease back."""
        await self._index.release(claim.lease)

    async def append(self, claim: Claim, drafts: Sequence[Draft]) -> None:
        """Add to a job's history: stored first, then indexed; `claim.job` is the job after it.

        Raises:
            Aborted: `stale_lease`, where another process has taken the job over; nothing is stored then.
        """
        await self._index.renew(claim.lease)
        now = datetime.now(UTC)
        job = claim.job
        records = []
        for draft in drafts:
            record = Record(job.last_sequence + 1, claim.lease.token, now, draft)
            records.append(record)
            job = job.apply(record)
        failpoint("record.before_store")
        await asyncio.to_thread(self._journal.append, job.id, records)
        failpoint("record.before_index")
        claim.job = job
        if not await self._index.append(job, records):
            await self._reindex(job.id)

    async def _store_new(self, request: JobRequest, first: Draft) -> Job:
        await asyncio.to_thread(self._journal.create, request)
        claim = await self.claim(request.id)
        if claim is None:
            raise StaleLeaseError(request.id)
        try:
            if claim.job.last_sequence == 0:
                await self.append(claim, [first])
        finally:
            await self.release(claim)
        return claim.job

    async def _known(self, request: JobRequest, bound: str) -> Job | None:
        """Return the job that an idempotency key stands for; None where it must be stored anew."""
        digest, job_id, time = bound.split(" ")
        if digest != request.request_digest:
            raise FailedPrecondition(
                "idempotency_key_reused",
                "the idempotency key was used with another request",
                field="idempotency_key",
                value=request.idempotency_key,
                final=True,
            )
        history = await self._reindex(job_id)
        if history is not None:
            return history.job
        if datetime.now(UTC).timestamp() - float(time) < CREATE_SECONDS:
            raise Aborted("request_in_progress", "the same request is being handled", retry_after_seconds=1.0)
        return None

    async def _reindex(self, job_id: str) -> History | None:
        history = await asyncio.to_thread(self._journal.load, job_id)
        if history is not None:
            await self._index.put(history)
        return history


def paused() -> Draft:
    """Return the draft that pauses a job."""
    return Draft("Job paused", state=JobState.PAUSED)


def _already_finished(job: Job, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        "already_finished",
        f"the job has {job.state} and cannot be {what}",
        resource=f"jobs/{job.id}",
        final=True,
    )


def _renamed(request: JobRequest, job_id: str) -> JobRequest:
    """Return the request under the id that an earlier try drew for it."""
    adapter = job_id if request.adapter == request.id else request.adapter
    return replace(request, id=job_id, adapter=adapter)
