"""Several trainers on one queue, and trainers that run out of room, memory or luck: rows 59, 60 and 61."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from lorafleet.registry.v1 import adapter_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from tests.support.trainer import (
    Trainer,
    TrainerPlace,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)
from tests.support.trainer_fixtures import base, place

__all__ = ["base", "place"]

SHORT = spec(n_epochs=1, batch_size=4, evaluation_rows=0, joint=False)
# 100 steps, alone.
LONG = spec(n_epochs=25, batch_size=4, validation_fraction=0.0, checkpoint_steps=10, joint=False)
TOTAL_STEPS = 100


async def num_versions(trainer: Trainer, adapter: str) -> int:
    response = await trainer.registry.call(
        trainer.registry.adapters.ListVersions, adapter_pb2.ListVersionsRequest(adapter=adapter)
    )
    return len(response.versions)


@pytest.mark.slow
async def test_two_trainers_share_one_queue(place: TrainerPlace) -> None:
    async with (
        registry_host(place) as registry,
        running_trainer(place, registry) as one,
        running_trainer(place, registry) as other,
    ):
        jobs = [await one.create(prompt_rows(16), SHORT, adapter=f"shared-{n}") for n in range(6)]
        busy: set[str] = set()
        for job in jobs:
            # Either trainer tells about every job.
            done = await other.until(job.id, job_pb2.JOB_STATE_SUCCEEDED, seconds=120)
            busy |= {name for name, trainer in (("one", one), ("other", other)) if trainer.children()}
            assert done.attempts == 1, "a job was done twice"
            assert await num_versions(one, job.adapter) == 1
        assert busy == {"one", "other"}, "one of them did nothing"


@pytest.mark.slow
async def test_row_59_trainer_that_was_overtaken_is_refused_and_publishes_nothing(
    place: TrainerPlace,
) -> None:
    """It is stopped for longer than its lease, as by a pause of its machine, and wakes up again."""
    async with registry_host(place) as registry, running_trainer(place, registry, LEASE_SECONDS="1") as stale:
        job = await stale.create(prompt_rows(16), LONG, adapter="fenced")
        await stale.past_step(job.id, 20)
        sleepers = [psutil.Process(stale.process.pid), *stale.children()]
        for process in sleepers:
            process.suspend()
        # On another machine, as it were: it cannot see that the other's process is alive.
        async with running_trainer(place, registry, LEASE_SECONDS="1") as fresh:
            async for event in fresh.watch(job.id):
                if "takes the job up again" in event.message:
                    break
            for process in reversed(sleepers):
                process.resume()
            done = await fresh.until(job.id, job_pb2.JOB_STATE_SUCCEEDED, seconds=100)
            assert (done.attempts, done.progress.step) == (2, TOTAL_STEPS)
            assert await num_versions(fresh, "fenced") == 1
            events = await fresh.events(job.id)
            assert [int(e.id.rpartition("-")[2]) for e in events] == list(range(1, len(events) + 1))
            steps = [event.metrics.step for event in events if event.HasField("metrics")]
            assert steps[-1] == TOTAL_STEPS
            await asyncio.to_thread(psutil.wait_procs, sleepers[1:], 20)
            assert not stale.children()
            assert (await stale.job(job.id)).state == job_pb2.JOB_STATE_SUCCEEDED


async def test_row_60_full_disk_fails_a_job_that_can_be_resumed(place: TrainerPlace) -> None:
    async with registry_host(place) as registry, running_trainer(place, registry) as trainer:
        job = await trainer.create(prompt_rows(16), LONG, adapter="squeezed")
        await trainer.past_step(job.id, 12)
        (child,) = trainer.children()
        # Every file it writes from now on is full after a kilobyte.
        child.rlimit(psutil.RLIMIT_FSIZE, (1024, 1024))
        failed = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED)
        assert "no room left" in failed.error.message
        listed = trainer_service_pb2.ListCheckpointsRequest(job_id=job.id)
        kept = (await trainer.call("ListCheckpoints", listed)).checkpoints[0]
        assert kept.step >= 10, "the checkpoint before is there"

        await trainer.call("ResumeJob", trainer_service_pb2.ResumeJobRequest(job_id=job.id))
        done = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED, seconds=90)
        assert (done.progress.step, await num_versions(trainer, "squeezed")) == (TOTAL_STEPS, 1)
        went_on = [e for e in await trainer.events(job.id) if e.message.startswith("Going on from step")]
        assert [event.data["step"] for event in went_on] == [kept.step]


@pytest.mark.slow
async def test_row_61_job_without_memory_fails_with_advice_and_the_next_one_runs(
    place: TrainerPlace,
) -> None:
    async with registry_host(place) as registry, running_trainer(place, registry) as trainer:
        rows = b'{"text": "' + b"x" * 480 + b'"}\n'
        large = spec(n_epochs=50, batch_size=32, max_seq_len=512, validation_fraction=0.0, joint=False)
        job = await trainer.create(rows * 64, large)
        await trainer.past_step(job.id, 2)
        (child,) = trainer.children()
        samples: list[int] = []
        room = 0
        # A step takes memory and gives it back; on a busy machine it may be long until it does.
        async with asyncio.timeout(60):
            while len(samples) < 60 or room <= 16 * 1024**2:
                samples.append(child.memory_info().data)
                room = (max(samples) - min(samples)) // 2
                await asyncio.sleep(0.05)
        # Half of what the next step will ask for.
        child.rlimit(psutil.RLIMIT_DATA, (min(samples) + room, min(samples) + room))
        failed = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED)
        assert "lower batch_size" in failed.error.message
        _, left = await asyncio.to_thread(psutil.wait_procs, [child], 30)
        assert not left, "the process is gone"
        after = await trainer.create(prompt_rows(8), SHORT, adapter="after")
        await trainer.until(after.id, job_pb2.JOB_STATE_SUCCEEDED)
