"""A store and an index, and books of jobs over them as different processes have them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import SecretStr
from redis.asyncio import Redis

from services.common.ids import new_id
from services.common.index_connection import open_index
from services.common.store import DirectoryStore
from services.trainer.book import Claim, JobBook
from services.trainer.index import JobIndex
from services.trainer.job import Draft, Facts, JobRequest, JobState
from services.trainer.journal import Journal
from services.trainer.lease import Holder
from services.trainer.spec import TrainingSpec

HERE = Holder.this_process()
ELSEWHERE = Holder("another-machine", 1, 1)
RUNNING = Draft("started", state=JobState.RUNNING, facts=Facts(claimed=True))
QUEUED = Draft("queued", state=JobState.QUEUED)


def request(tenant: str = "acme", *, key: str = "", digest: str = "d", job_id: str = "") -> JobRequest:
    job_id = job_id or new_id("ftjob")
    return JobRequest(
        id=job_id,
        tenant=tenant,
        base_model="tiny",
        training_file=new_id("file"),
        validation_file="",
        adapter=job_id,
        spec=TrainingSpec(max_seq_len=64),
        seed=1,
        metadata={},
        create_time=datetime.now(UTC),
        idempotency_key=key,
        request_digest=digest,
    )


class Desk:
    """A store and an index, and books over them for different processes."""

    def __init__(self, redis: Redis, folder: Path) -> None:
        self.redis = redis
        self.store = DirectoryStore(folder)
        self.store.ready()
        self.journal = Journal(self.store)

    def book(self, holder: Holder = HERE, *, lease_seconds: float = 10.0) -> JobBook:
        return JobBook(self.journal, JobIndex(self.redis, lease_seconds=lease_seconds), holder)


@asynccontextmanager
async def open_desk(redis_url: str, folder: Path) -> AsyncIterator[Desk]:
    redis = open_index(SecretStr(redis_url))
    try:
        yield Desk(redis, folder)
    finally:
        await redis.aclose()


async def claimed(book: JobBook, job_id: str) -> Claim:
    claim = await book.claim(job_id)
    assert claim is not None
    return claim
