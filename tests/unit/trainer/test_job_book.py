"""The book of jobs on a real Valkey and a directory store: what survives, and who may write."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.common.errors import Aborted, FailedPrecondition, NotFound
from services.common.ids import new_id
from services.trainer.book import JobBook
from services.trainer.index import JobView, Lane, StaleLeaseError
from services.trainer.job import (
    Checkpoint,
    Draft,
    Facts,
    JobState,
    Level,
    Publication,
    event_id,
    event_sequence,
)
from services.trainer.lease import Holder
from tests.support.job_desk import ELSEWHERE, HERE, QUEUED, RUNNING, claimed, open_desk, request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


async def everything(book: JobBook, tenant: str = "acme") -> list[JobView]:
    found, more = await book.newest(tenant, before=None, limit=1000, matches=lambda view: True)
    assert not more
    return found


async def test_history_is_the_same_after_the_index_is_lost(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        await book.ensure_indexed()
        for number in range(5):
            job = await book.create(request(key=f"k{number}"), message="created")
            if number > 1:
                claim = await claimed(book, job.id)
                await book.append(claim, [QUEUED, RUNNING] if number > 2 else [QUEUED])
                await book.append(claim, [Draft("remark", level=Level.WARN, data={"x": 1.5})])
                if number == 4:
                    await book.append(claim, [Draft("done", state=JobState.SUCCEEDED)])
                await book.release(claim)
        before = await everything(book)
        records = [await book.records(view.job, 1, 100) for view in before]
        states = ["succeeded", "running", "queued", "validating_files", "validating_files"]
        assert [view.state for view in before] == states

        await desk.redis.flushall()
        fresh = desk.book()
        assert await everything(fresh) == before
        assert [await fresh.records(view.job, 1, 100) for view in before] == records
        assert (await fresh.create(request(key="k4"), message="again")).id == before[0].job.id


async def test_publication_beside_a_worker_outlives_what_it_records_and_the_index(
    redis_url: str, folder: Path
) -> None:
    async with open_desk(redis_url, folder) as desk:
        working, asked = desk.book(ELSEWHERE), desk.book()
        job = await working.create(request(), message="created")
        claim = await claimed(working, job.id)
        await working.append(claim, [QUEUED, RUNNING])
        made = [
            Publication("ftckpt-1", name, f"ft:tiny:acme:{name}:v1", datetime(2026, 1, day, tzinfo=UTC))
            for name, day in (("b", 1), ("a", 2))
        ]
        for publication in made:
            await asked.add_publication(job, publication)
        await working.append(claim, [Draft("remark")])
        assert await asked.publications(job) == made
        await desk.redis.flushall()
        fresh = desk.book()
        view = await fresh.get("acme", job.id)
        assert view.job.last_sequence == 4
        assert await fresh.publications(view.job) == made


async def test_only_the_tenant_sees_a_job(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        assert await everything(book, "other") == []
        for attempt in (book.get("other", job.id), book.ask_cancel("other", job.id)):
            with pytest.raises(NotFound) as caught:
                await attempt
            assert caught.value.reason == "job_not_found"
        assert not await book.cancel_asked(job.id)


async def test_pages_of_jobs_have_no_gap(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        ids = []
        for number in range(7):
            job_id = new_id("ftjob", now_ms=1_700_000_000_000 + number)
            ids.append((await book.create(request(job_id=job_id), message="created")).id)
        odd = set(ids[1::2])
        found: list[str] = []
        before, more = None, True
        while more:
            page, more = await book.newest(
                "acme", before=before, limit=2, matches=lambda view: view.job.id in odd
            )
            found += [view.job.id for view in page]
            before = found[-1]
        assert found == sorted(odd, reverse=True)


async def test_two_processes_never_hold_one_job(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        books = [desk.book(Holder(f"machine-{number}", 1, 1)) for number in range(8)]
        job = await books[0].create(request(), message="created")
        claims = await asyncio.gather(*[book.claim(job.id) for book in books])
        assert sum(claim is not None for claim in claims) == 1


async def test_row_59_holder_that_was_overtaken_cannot_write(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        slow, quick = desk.book(ELSEWHERE, lease_seconds=1.0), desk.book()
        job = await slow.create(request(), message="created")
        old = await claimed(slow, job.id)
        await slow.append(old, [QUEUED])
        await asyncio.sleep(1.1)
        new = await claimed(quick, job.id)
        await quick.append(new, [RUNNING])
        for attempt in (slow.append(old, [Draft("late", state=JobState.FAILED)]), slow.renew(old)):
            with pytest.raises(StaleLeaseError) as caught:
                await attempt
            assert isinstance(caught.value, Aborted)
            assert caught.value.reason == "stale_lease"
        await slow.release(old)
        assert await slow.claim(job.id) is None, "a late release freed the other's lease"
        assert (await quick.get("acme", job.id)).state is JobState.RUNNING


async def test_row_59_record_of_an_overtaken_writer_does_not_count(redis_url: str, folder: Path) -> None:
    """Even where it reached the store, between the check of its lease and the loss of it."""
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED])
        await book.append(claim, [RUNNING])
        (last,) = await book.records(claim.job, 3, 3)
        stale = replace(last, token=last.token - 1, draft=Draft("late", state=JobState.FAILED))
        desk.journal.append(job.id, [stale])
        desk.journal.append(job.id, [replace(stale, sequence=4)])
        await book.release(claim)
        again = await claimed(book, job.id)
        assert again.job.state is JobState.RUNNING
        assert again.job.last_sequence == 3


async def test_lease_of_a_dead_process_here_is_free_at_once(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        child = await asyncio.create_subprocess_exec("true")
        dead = Holder(HERE.machine, child.pid, HERE.started)
        await child.wait()
        job = await desk.book().create(request(), message="created")
        await claimed(desk.book(dead, lease_seconds=100), job.id)
        assert await desk.book().claim(job.id) is not None
        assert await desk.book(ELSEWHERE).claim(job.id) is None
        assert Holder.parse(str(HERE)) == HERE
        assert not HERE.is_known_dead()


async def test_holder_goes_on_after_the_index_is_lost(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book(ELSEWHERE)
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED, RUNNING])
        await desk.redis.flushall()
        other = desk.book()
        await other.ensure_indexed()
        assert await other.claim_next(Lane.TRAINING, passing_over=()) is None, "its worker may be alive"
        await book.append(claim, [Draft("still here")])
        assert (await other.get("acme", job.id)).job == claim.job
        assert len(await other.records(claim.job, 1, 10)) == 4


async def test_record_that_was_stored_and_not_indexed_is_found(redis_url: str, folder: Path) -> None:
    """As after kill -9 between the two."""
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED, RUNNING])
        (last,) = await book.records(claim.job, 3, 3)
        done = replace(last, sequence=4, draft=Draft("done", state=JobState.SUCCEEDED))
        desk.journal.append(job.id, [done])
        await book.release(claim)
        await desk.redis.set("trainer:complete", 1)
        assert (await book.get("acme", job.id)).state is JobState.RUNNING
        assert await book.claim_next(Lane.TRAINING, passing_over=()) is None
        assert (await book.get("acme", job.id)).state is JobState.SUCCEEDED


async def test_lanes_follow_the_state_oldest_first(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        ids = [new_id("ftjob", now_ms=1_700_000_000_000 + number) for number in range(3)]
        for job_id in reversed(ids):
            await book.create(request(job_id=job_id), message="created")
        assert await book.claim_next(Lane.TRAINING, passing_over=()) is None
        first = await book.claim_next(Lane.VALIDATION, passing_over=())
        second = await book.claim_next(Lane.VALIDATION, passing_over=())
        assert first is not None
        assert second is not None
        assert [first.job.id, second.job.id] == ids[:2]
        await book.append(first, [QUEUED])
        await book.release(first)
        assert await book.claim_next(Lane.TRAINING, passing_over=[ids[0]]) is None
        queued = await book.claim_next(Lane.TRAINING, passing_over=())
        assert queued is not None
        assert queued.job.id == ids[0]


async def test_row_57_same_key_gives_the_first_job(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        first = await book.create(request(key="once"), message="created")
        assert await book.create(request(key="once"), message="created") == first
        assert (await book.create(request("other", key="once"), message="created")).id != first.id
        with pytest.raises(FailedPrecondition) as caught:
            await book.create(request(key="once", digest="different"), message="created")
        assert caught.value.reason == "idempotency_key_reused"
        assert len(await everything(book)) == 1


async def test_row_57_two_at_once_make_one_job(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        results = await asyncio.gather(
            *[book.create(request(key="once"), message="created") for _ in range(6)], return_exceptions=True
        )
        made = {result.id for result in results if not isinstance(result, BaseException)}
        refused = [result for result in results if isinstance(result, Aborted)]
        assert len(made) == 1
        assert len(made) + len(refused) <= 6
        assert {error.reason for error in refused} <= {"request_in_progress"}
        assert all(error.retry_after_seconds for error in refused)
        assert len(await everything(book)) == 1


async def test_cancel_before_any_worker_has_the_job(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        for _ in range(2):
            assert (await book.ask_cancel("acme", job.id)).state is JobState.CANCELLED
        assert await book.claim_next(Lane.VALIDATION, passing_over=()) is None


async def test_cancel_of_a_job_in_work_is_shown_and_outlives_the_index(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book(ELSEWHERE)
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED, RUNNING])
        assert (await desk.book().ask_cancel("acme", job.id)).state is JobState.CANCELLING
        await desk.redis.flushall()
        assert (await desk.book().get("acme", job.id)).state is JobState.CANCELLING
        assert await book.cancel_asked(job.id)
        await book.append(claim, [Draft("cancelled", state=JobState.CANCELLED)])
        assert not await book.cancel_asked(job.id)


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
async def test_row_63_ended_job_cannot_be_cancelled(redis_url: str, folder: Path, state: JobState) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED, RUNNING, Draft("end", state=state)])
        await book.release(claim)
        with pytest.raises(FailedPrecondition) as caught:
            await book.ask_cancel("acme", job.id)
        assert caught.value.reason == "already_finished"


async def test_crashes_are_counted_between_checkpoints(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        again = Draft("again", facts=Facts(claimed=True))
        await book.append(claim, [QUEUED, RUNNING, again])
        assert (claim.job.attempts, claim.job.crashes) == (2, 1)
        await book.append(claim, [Draft("crash", facts=Facts(crashed=True)), again])
        assert (claim.job.attempts, claim.job.crashes) == (3, 2)
        await book.append(claim, [Draft("released", facts=Facts(released=True)), again])
        assert (claim.job.attempts, claim.job.crashes) == (4, 2)
        checkpoint = Checkpoint("ftckpt-1", 5, datetime.now(UTC), 0.5, "sha256:0", 100)
        await book.append(claim, [Draft("checkpoint", facts=Facts(checkpoint=checkpoint))])
        assert (claim.job.crashes, claim.job.trained_tokens) == (0, 100)


def test_event_ids() -> None:
    job_id = new_id("ftjob")
    assert event_sequence(job_id, event_id(job_id, 12)) == 12
    other = event_id(new_id("ftjob"), 12)
    for text in ("", "12", other, event_id(job_id, 12) + "x", f"{event_id(job_id, 1)}²", "ftevent--1"):
        with pytest.raises(NotFound) as caught:
            event_sequence(job_id, text)
        assert caught.value.reason == "event_not_found"
