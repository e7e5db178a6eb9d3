"""Jobs over gRPC: a real trainer process, registry, Valkey, directory store and NF4 base."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lorafleet.registry.v1 import adapter_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from tests.support.models import make_tiny_llama
from tests.support.trainer import (
    BASE,
    TENANT,
    Trainer,
    TrainerPlace,
    losses,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / BASE)


@pytest_asyncio.fixture
async def trainer(base: Path, tmp_path: Path, redis_url: str) -> AsyncIterator[Trainer]:
    place = TrainerPlace(base, tmp_path, redis_url)
    async with registry_host(place) as registry, running_trainer(place, registry) as running:
        yield running


async def test_job_from_file_to_published_version(trainer: Trainer, base: Path, tmp_path: Path) -> None:
    asked = spec(
        task_metric=job_pb2.TASK_METRIC_EXACT_MATCH, checkpoint_steps=5, n_epochs=4, validation_fraction=0.25
    )
    job = await trainer.create(prompt_rows(24), asked, adapter="digits", metadata={"team": "a"})
    assert job.state == job_pb2.JOB_STATE_VALIDATING_FILES
    assert job.spec.alpha == 8
    assert job.seed == 7

    events = [event async for event in trainer.watch(job.id)]

    job = await trainer.job(job.id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job
    assert [event.id for event in events] == [
        f"ftevent-{job.id.partition('-')[2]}-{number}" for number in range(1, len(events) + 1)
    ]
    values = losses(events)
    assert values[-1] < values[0] / 2, values
    print(values, job)
