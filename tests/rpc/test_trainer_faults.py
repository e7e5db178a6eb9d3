"""What a job survives: its child killed, its trainer killed or stopped, the index lost, the registry away."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest
import redis.asyncio
from google.rpc import error_details_pb2
from safetensors.torch import load_file, save_file

from lorafleet.registry.v1 import adapter_pb2
from lorafleet.trainer.v1 import job_pb2
from services.common.errors import Code, LorafleetError, NotFound
from tests.support.models import make_tiny_llama
from tests.support.trainer import (
    BASE,
    Trainer,
    TrainerPlace,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)
from tests.support.trainer_fixtures import base, place

__all__ = ["base", "place"]

DATA = prompt_rows(64)
# 16 steps an epoch.
SPEC = spec(n_epochs=7, batch_size=4, validation_fraction=0.0, checkpoint_steps=10, dropout=0.1)
# Two jobs of it never share a process, however soon one comes after the other.
ALONE = spec(n_epochs=7, batch_size=4, validation_fraction=0.0, checkpoint_steps=10, dropout=0.1, joint=False)
TOTAL_STEPS = 112


async def finished(trainer: Trainer, job_id: str) -> job_pb2.Job:
    """The job at its end, which is a success, with a history without gap or step back."""
    job = await trainer.until(job_id, job_pb2.JOB_STATE_SUCCEEDED, seconds=90)
    events = await trainer.events(job_id)
    assert [int(event.id.rpartition("-")[2]) for event in events] == list(range(1, len(events) + 1))
    states = [event.state for event in events if event.state]
    assert states == sorted(set(states)), "a state came back"
    assert job.progress.step == TOTAL_STEPS
    return job


async def the_one_version(trainer: Trainer, adapter: str) -> adapter_pb2.AdapterVersion:
    response = await trainer.registry.call(
        trainer.registry.adapters.ListVersions, adapter_pb2.ListVersionsRequest(adapter=adapter)
    )
    (version,) = response.versions
    assert isinstance(version, adapter_pb2.AdapterVersion)
    return version


@pytest.mark.slow
async def test_job_whose_child_was_killed_ends_with_the_same_adapter(place: TrainerPlace) -> None:
    async with registry_host(place) as registry, running_trainer(place, registry) as trainer:
        broken = await trainer.create(DATA, SPEC, adapter="broken")
        await trainer.past_step(broken.id, 25)
        (child,) = trainer.children()
        child.kill()
        through = await trainer.create(DATA, SPEC, adapter="through")

        job = await finished(trainer, broken.id)
        assert job.attempts == 2
        assert (await finished(trainer, through.id)).attempts == 1
        resumed = [e for e in await trainer.events(broken.id) if e.message.startswith("Going on from step")]
        assert resumed[0].data["step"] >= 20
        one = await the_one_version(trainer, "broken")
        other = await the_one_version(trainer, "through")
        assert one.digest == other.digest


async def test_row_58_killed_child_is_replaced_and_goes_on(place: TrainerPlace) -> None:
    async with registry_host(place) as registry, running_trainer(place, registry) as trainer:
        job = await trainer.create(DATA, SPEC, adapter="broken")
        await trainer.past_step(job.id, 25)
        (child,) = trainer.children()
        child.kill()
        done = await finished(trainer, job.id)
        assert done.attempts == 2
        resumed = [e for e in await trainer.events(job.id) if e.message.startswith("Going on from step")]
        assert resumed[0].data["step"] >= 20
        await the_one_version(trainer, "broken")


async def test_row_58_killed_trainer_takes_its_job_up_again(place: TrainerPlace) -> None:
    async with registry_host(place) as registry:
        async with running_trainer(place, registry) as trainer:
            job = await trainer.create(DATA, ALONE, adapter="survivor")
            waiting = await trainer.create(DATA, ALONE, adapter="waiting")
            await trainer.past_step(job.id, 25)
            (child,) = trainer.children()
            trainer.kill()
            await trainer.process.wait()
            async with asyncio.timeout(5):
                await asyncio.to_thread(_wait_for_end, child)
        async with running_trainer(place, registry) as trainer:
            assert (await trainer.job(waiting.id)).state == job_pb2.JOB_STATE_QUEUED
            done = await finished(trainer, job.id)
            assert done.attempts == 2
            await the_one_version(trainer, "survivor")


@pytest.mark.slow
async def test_row_64_stopped_trainer_hands_its_job_back(place: TrainerPlace) -> None:
    async with registry_host(place) as registry:
        async with running_trainer(place, registry) as trainer:
            job = await trainer.create(DATA, SPEC, adapter="handed-back")
            await trainer.past_step(job.id, 25)
            assert await trainer.terminate() == 0
        async with running_trainer(place, registry) as trainer:
            done = await finished(trainer, job.id)
            events = await trainer.events(job.id)
            last_told = max(
                event.metrics.step
                for event in events[: next(i for i, e in enumerate(events) if "stopping" in e.message)]
            )
            resumed = [event for event in events if event.message.startswith("Going on from step")]
            assert resumed[0].data["step"] >= last_told, "work was lost"
            assert done.attempts == 2
            await the_one_version(trainer, "handed-back")


async def test_row_62_job_whose_loss_is_not_a_number_fails_and_publishes_nothing(
    place: TrainerPlace, tmp_path: Path
) -> None:
    broken = make_tiny_llama(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    bases = json.dumps({"broken": str(broken), BASE: str(place.base)})
    async with registry_host(place) as registry, running_trainer(place, registry, BASES=bases) as trainer:
        job = await trainer.create(DATA, SPEC, adapter="diverged", base_model="broken")
        job = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED)
        info = error_details_pb2.ErrorInfo()
        assert job.error.details[0].Unpack(info)
        assert info.reason == "diverged"
        assert "3 steps in a row" in job.error.message
        warned = [e for e in await trainer.events(job.id) if e.level == job_pb2.EVENT_LEVEL_WARN]
        assert [e.data["bad_steps"] for e in warned if "bad_steps" in e.data] == [1, 2, 3]
        with pytest.raises(NotFound):
            await the_one_version(trainer, "diverged")


async def test_row_54_file_above_the_limit_is_refused(
    place: TrainerPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with registry_host(place) as registry:
        # The registry has taken files of this size before it was told of a lower limit.
        monkeypatch.setenv("LORAFLEET_MAX_FILE_BYTES", "1000")
        async with running_trainer(place, registry) as trainer:
            with pytest.raises(LorafleetError) as caught:
                await trainer.create(prompt_rows(100), SPEC)
            assert (caught.value.reason, caught.value.code) == (
                "dataset_too_large",
                Code.RESOURCE_EXHAUSTED,
            )
            assert (caught.value.field, caught.value.limit) == ("training_file", "1000")
            assert caught.value.final


def _wait_for_end(process: psutil.Process) -> None:
    """Return once a process that is not our child has ended."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


async def _lose_index(place: TrainerPlace) -> None:
    async with redis.asyncio.Redis.from_url(place.redis_url) as client:
        await client.flushall()


@pytest.mark.slow
async def test_lost_index_costs_no_job(place: TrainerPlace) -> None:
    async with registry_host(place) as registry, running_trainer(place, registry) as trainer:
        bad = await trainer.create(b"bad")
        await trainer.until(bad.id, job_pb2.JOB_STATE_FAILED)
        job = await trainer.create(DATA, SPEC, adapter="unharmed")
        await trainer.past_step(job.id, 10)
        before = await trainer.job(bad.id)
        await _lose_index(place)
        assert await trainer.job(bad.id) == before
        done = await finished(trainer, job.id)
        assert done.attempts == 1
        await the_one_version(trainer, "unharmed")


@pytest.mark.slow
async def test_registry_that_is_away_is_waited_for(place: TrainerPlace) -> None:
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(registry_host(place))
        port = int(registry.rpartition(":")[2])
        async with running_trainer(place, registry) as trainer:
            job = await trainer.create(DATA, SPEC, adapter="patient")
            await trainer.past_step(job.id, 10)
            await stack.aclose()
            await trainer.past_step(job.id, TOTAL_STEPS - 1)
            await asyncio.sleep(1.0)
            assert (await trainer.job(job.id)).state == job_pb2.JOB_STATE_RUNNING
            async with registry_host(place, port=port):
                done = await finished(trainer, job.id)
                assert done.attempts == 1
                await the_one_version(trainer, "patient")
