"""Pausing and resuming over a real Valkey and a directory store: one wish, one pause, whatever is lost."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, LorafleetError, ResourceExhausted
from services.trainer.book import JobBook
from services.trainer.failure import JobFailure
from services.trainer.index import Lane
from services.trainer.job import Checkpoint, Draft, Facts, JobState
from tests.support.job_desk import ELSEWHERE, QUEUED, RUNNING, claimed, open_desk, request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


async def test_waiting_job_pauses_at_once_and_waits_again_after_a_resume(
    redis_url: str, folder: Path
) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED])
        await book.release(claim)
        for _ in range(2):
            assert (await book.ask_pause("acme", job.id)).state is JobState.PAUSED
        assert await book.claim_next(Lane.TRAINING, passing_over=()) is None
        assert (await book.resume("acme", job.id)).state is JobState.QUEUED
        again = await book.claim_next(Lane.TRAINING, passing_over=())
        assert again is not None
        assert not await book.pause_asked(again.job), "the wish was honoured before"


async def test_wish_to_pause_a_job_in_work_outlives_the_index_and_ends_with_the_pause(
    redis_url: str, folder: Path
) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book(ELSEWHERE)
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED, RUNNING])
        asked = await desk.book().ask_pause("acme", job.id)
        assert (asked.state, asked.pause_asked) == (JobState.RUNNING, True)
        with pytest.raises(FailedPrecondition, match="still stopping") as caught:
            await desk.book().resume("acme", job.id)
        assert caught.value.reason == "not_paused"

        await desk.redis.flushall()
        assert (await desk.book().get("acme", job.id)).pause_asked
        assert await book.pause_asked(claim.job)
        await book.append(claim, [Draft("paused", state=JobState.PAUSED)])
        await book.release(claim)
        assert not await book.pause_asked(claim.job)
        await desk.redis.flushall()
        view = await desk.book().get("acme", job.id)
        assert (view.state, view.pause_asked) == (JobState.PAUSED, False)

        await desk.book().resume("acme", job.id)
        claim = await claimed(book, job.id)
        await book.append(claim, [RUNNING])
        assert claim.job.attempts == 2
        assert claim.job.crashes == 0, "a pause is no crash"
        assert (await desk.book().ask_pause("acme", job.id)).pause_asked, "a second pause is a new wish"


async def test_start_time_is_that_of_the_first_start(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED, RUNNING])
        started = claim.job.start_time
        assert started is not None
        pause = [Draft("paused", state=JobState.PAUSED), QUEUED, RUNNING]
        await book.append(claim, pause)
        assert claim.job.start_time == started


async def test_pause_of_a_job_that_is_validated_waits_for_its_queue(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        view = await book.ask_pause("acme", job.id)
        assert (view.state, view.pause_asked) == (JobState.VALIDATING_FILES, True)
        claim = await book.claim_next(Lane.VALIDATION, passing_over=())
        assert claim is not None
        await book.append(claim, [QUEUED])
        assert await book.pause_asked(claim.job)


async def test_paused_job_can_be_cancelled_and_an_ended_one_neither_paused_nor_resumed(
    redis_url: str, folder: Path
) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        await book.append(claim, [QUEUED])
        await book.release(claim)
        await book.ask_pause("acme", job.id)
        assert (await book.ask_cancel("acme", job.id)).state is JobState.CANCELLED
        for attempt in (book.ask_pause("acme", job.id), book.resume("acme", job.id)):
            with pytest.raises(FailedPrecondition) as caught:
                await attempt
            assert caught.value.reason == "already_finished"
        for attempt in (book.ask_pause("other", job.id), book.resume("other", job.id)):
            with pytest.raises(LorafleetError) as missing:
                await attempt
            assert missing.value.reason == "job_not_found"


async def test_companions_are_the_free_jobs_that_suit_oldest_first(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book, other = desk.book(), desk.book(ELSEWHERE)
        ids = []
        for _ in range(6):
            job = await book.create(request(), message="created")
            claim = await claimed(book, job.id)
            await book.append(claim, [QUEUED])
            await book.release(claim)
            ids.append(job.id)
        first = await book.claim_next(Lane.TRAINING, passing_over=())
        assert first is not None
        assert await other.claim(ids[1]) is not None
        found = await book.claim_companions(
            Lane.TRAINING, passing_over={ids[0]}, limit=2, suits=lambda job: job.id != ids[2]
        )
        assert [claim.job.id for claim in found] == [ids[3], ids[4]]
        assert await other.claim(ids[2]) is not None, "what does not suit stays free"
        assert await other.claim(ids[3]) is None
        assert found[0].lease.token != first.lease.token or found[0].lease.job_id != first.lease.job_id


async def test_crash_is_counted_after_a_resume_too(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job = await book.create(request(), message="created")
        claim = await claimed(book, job.id)
        pause = Draft("paused", state=JobState.PAUSED)
        await book.append(claim, [QUEUED, RUNNING, pause, QUEUED, RUNNING])
        await book.append(claim, [Draft("again", facts=Facts(claimed=True))])
        assert (claim.job.attempts, claim.job.crashes) == (3, 1)


async def failed_job(book: JobBook, error: LorafleetError) -> str:
    job = await book.create(request(), message="created")
    claim = await claimed(book, job.id)
    checkpoint = Checkpoint("ftckpt-1", 5, datetime.now(UTC), 1.0, "sha256:0", 10)
    kept = Draft("checkpoint", facts=Facts(checkpoint=checkpoint))
    failure = Draft("failed", state=JobState.FAILED, facts=Facts(failure=JobFailure.of(error)))
    await book.append(claim, [QUEUED, RUNNING, kept, failure])
    await book.release(claim)
    return job.id


@pytest.mark.parametrize("reason", ["storage_full", "out_of_memory", "worker_crashed"])
async def test_row_60_job_that_failed_for_want_of_room_or_memory_can_be_resumed(
    redis_url: str, folder: Path, reason: str
) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job_id = await failed_job(book, ResourceExhausted(reason, "no room", final=True))
        view = await book.resume("acme", job_id)
        assert (view.state, view.job.failure, view.job.end_time) == (JobState.QUEUED, None, None)
        assert view.job.checkpoints[-1].step == 5
        claim = await book.claim_next(Lane.TRAINING, passing_over=())
        assert claim is not None
        await desk.redis.flushall()
        assert (await book.get("acme", job_id)).job == claim.job


async def test_job_that_failed_by_itself_cannot_be_resumed(redis_url: str, folder: Path) -> None:
    async with open_desk(redis_url, folder) as desk:
        book = desk.book()
        job_id = await failed_job(book, FailedPrecondition("diverged", "not finite", final=True))
        with pytest.raises(FailedPrecondition) as caught:
            await book.resume("acme", job_id)
        assert caught.value.reason == "already_finished"
