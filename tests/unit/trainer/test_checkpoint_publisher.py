"""Publishing a checkpoint outlasts its callers, and the next one is told what came of it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition
from services.trainer.bases import BaseCatalog
from services.trainer.checkpoint_publisher import CheckpointPublisher
from services.trainer.config import TrainerSettings
from services.trainer.job import Checkpoint, Job, ParityReport
from services.trainer.parity import parity_failed
from services.trainer.registry_client import RegistryClient
from tests.support.job_desk import Desk, open_desk, request

CHECKPOINT = Checkpoint("ftckpt-1", 4, datetime.now(UTC), 1.0, "sha256:0", 100)
REPORT = ParityReport(rows=1, tokens=2, max_difference=3.0, mean_difference=2.0, tolerance=1e-3)


class RefusingPublisher(CheckpointPublisher):
    """Works until it is let go on, and finds that serving differs."""

    def __init__(self, desk: Desk, registry: RegistryClient) -> None:
        super().__init__(desk.book(), desk.store, registry, BaseCatalog(), TrainerSettings.model_construct())
        self.works = 0
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def _work(self, job: Job, checkpoint: Checkpoint, adapter: str, traceparent: str) -> str:
        self.works += 1
        self.begun.set()
        await self.go_on.wait()
        raise parity_failed(REPORT)


async def test_refusal_is_told_to_the_next_caller_where_the_first_has_gone(
    redis_url: str, tmp_path: Path
) -> None:
    async with open_desk(redis_url, tmp_path / "store") as desk:
        registry = RegistryClient("127.0.0.1:1")
        publisher = RefusingPublisher(desk, registry)
        job = Job(request())

        def call() -> asyncio.Task[str]:
            return asyncio.create_task(publisher.publish(job, CHECKPOINT, "name"))

        gone = call()
        await publisher.begun.wait()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        publisher.go_on.set()
        assert [await refused(call()), publisher.works] == ["parity_failed", 1]

        # It is told once; whoever comes later has it measured again.
        assert [await refused(call()), publisher.works] == ["parity_failed", 2]
        await publisher.stop()
        await registry.close()


async def refused(call: asyncio.Task[str]) -> str:
    with pytest.raises(FailedPrecondition) as caught:
        await call
    return caught.value.reason
