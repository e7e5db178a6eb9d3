"""Control of jobs over gRPC: estimates, refusals by size, pauses, watches, joint runs, metrics."""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common.errors import Code, LorafleetError
from services.common.valkey import EmbeddedValkey
from tests.support.models import make_tiny_llama
from tests.support.trainer import (
    BASE,
    FINAL,
    Trainer,
    TrainerPlace,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)

# One trainer for the whole file: starting one takes seconds.
pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT_BYTES = 1024**3
LONG = spec(n_epochs=50, batch_size=1, validation_fraction=0.0, checkpoint_steps=20, joint=False)


@dataclass(frozen=True)
class Place:
    trainer: Trainer
    metrics_url: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    folder = tmp_path_factory.mktemp("trainer")
    base = make_tiny_llama(folder / BASE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with EmbeddedValkey.start(folder / "valkey") as valkey:
        where = TrainerPlace(base, folder, valkey.url)
        changes = {"MEMORY_LIMIT_BYTES": str(LIMIT_BYTES), "METRICS_LISTEN": f"127.0.0.1:{port}"}
        async with registry_host(where) as registry, running_trainer(where, registry, **changes) as running:
            yield Place(running, f"http://127.0.0.1:{port}/metrics")


@pytest.fixture
def trainer(place: Place) -> Trainer:
    return place.trainer


async def pause(trainer: Trainer, job_id: str) -> job_pb2.Job:
    job: job_pb2.Job = await trainer.call("PauseJob", trainer_service_pb2.PauseJobRequest(job_id=job_id))
    return job


async def resume(trainer: Trainer, job_id: str) -> job_pb2.Job:
    job: job_pb2.Job = await trainer.call("ResumeJob", trainer_service_pb2.ResumeJobRequest(job_id=job_id))
    return job


async def test_created_job_carries_an_estimate_that_the_validation_confirms(trainer: Trainer) -> None:
    # More than the beginning of the file is looked at for the estimate.
    data = prompt_rows(6000)
    file = await trainer.registry.create_file(data)
    asked = spec(n_epochs=2, batch_size=4, validation_fraction=0.1)
    created = await trainer.create(b"{}\n", asked, training_file=file.id)
    first = created.estimate
    await pause(trainer, created.id)
    job = await trainer.until(created.id, job_pb2.JOB_STATE_PAUSED)
    assert job.estimate.tokens == job.dataset.tokens * 2
    assert job.estimate.steps == 2 * -(-job.dataset.rows // 4)
    assert first.tokens == pytest.approx(job.estimate.tokens, rel=0.1)
    assert first.steps == pytest.approx(job.estimate.steps, rel=0.1)
    assert first.minutes > 0
    assert first.minutes_basis in ("assumed", "earlier_jobs")
    parts = {"base", "adapter", "gradients", "optimizer", "activations", "logits", "runtime"}
    assert set(first.memory_bytes) == parts
    assert sum(first.memory_bytes.values()) == first.total_bytes <= first.limit_bytes == LIMIT_BYTES
    buckets = {bucket.up_to_tokens: bucket.rows for bucket in job.dataset.supervised_histogram}
    assert buckets == {4: job.dataset.rows}, "each answer has two characters and an end"
    await trainer.cancel(created.id)


async def test_job_that_cannot_fit_is_refused_with_the_arithmetic(trainer: Trainer) -> None:
    rows = b'{"text": "' + b"x" * 500 + b'"}\n'
    with pytest.raises(LorafleetError) as caught:
        await trainer.create(rows * 4, spec(batch_size=256, max_seq_len=512))
    error = caught.value
    assert (error.reason, error.code) == ("job_too_large", Code.RESOURCE_EXHAUSTED)
    assert "logits" in error.message
    assert f"may use {LIMIT_BYTES // 1024**2:,} MiB" in error.message
    assert int(error.metadata["activations_bytes"]) + int(error.metadata["logits_bytes"]) > LIMIT_BYTES
    assert (await trainer.create(rows * 4, spec(batch_size=1, max_seq_len=512, n_epochs=1))).id


async def test_paused_job_gives_its_worker_back_and_goes_on_where_it_stopped(trainer: Trainer) -> None:
    job = await trainer.create(prompt_rows(16), LONG, adapter="rested")
    reached = await trainer.past_step(job.id, 30)
    asked = await pause(trainer, job.id)
    assert asked.state in (job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_PAUSED)
    paused = await trainer.until(job.id, job_pb2.JOB_STATE_PAUSED, seconds=10)
    assert (await pause(trainer, job.id)).state == job_pb2.JOB_STATE_PAUSED
    listed = await trainer.call(
        "ListCheckpoints", trainer_service_pb2.ListCheckpointsRequest(job_id=job.id, page_size=1)
    )
    assert listed.checkpoints[0].step >= reached, "what was done before the pause is kept"
    assert not paused.HasField("end_time")

    other = await trainer.create(prompt_rows(8), spec(n_epochs=1, evaluation_rows=0))
    await trainer.until(other.id, job_pb2.JOB_STATE_SUCCEEDED)
    assert (await trainer.job(job.id)).state == job_pb2.JOB_STATE_PAUSED

    assert (await resume(trainer, job.id)).state == job_pb2.JOB_STATE_QUEUED
    done = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED, seconds=90)
    assert done.progress.step == done.progress.total_steps == 800
    went_on = [e for e in await trainer.events(job.id) if e.message.startswith("Going on from step")]
    assert [e.data["step"] for e in went_on] == [listed.checkpoints[0].step]
    for action in (pause, resume):
        with pytest.raises(LorafleetError) as caught:
            await action(trainer, job.id)
        assert caught.value.reason == "already_finished"


async def test_only_a_paused_job_is_resumed(trainer: Trainer) -> None:
    job = await trainer.create(prompt_rows(64), LONG)
    with pytest.raises(LorafleetError) as caught:
        await resume(trainer, job.id)
    assert (caught.value.reason, caught.value.code) == ("not_paused", Code.FAILED_PRECONDITION)
    await trainer.cancel(job.id)


async def test_row_65_watch_that_reconnects_sees_every_event_once(trainer: Trainer) -> None:
    job = await trainer.create(prompt_rows(16), spec(n_epochs=10, batch_size=2, evaluation_rows=0))
    seen: list[job_pb2.JobEvent] = []
    while not seen or seen[-1].state not in FINAL:
        taken = 0
        async for event in trainer.watch(job.id, after=seen[-1].id if seen else ""):
            seen.append(event)
            taken += 1
            if taken == 3:
                break
    assert seen == await trainer.events(job.id)
    numbers = [int(event.id.rpartition("-")[2]) for event in seen]
    assert numbers == list(range(1, len(seen) + 1))


async def test_row_52_duplicates_and_overlap_are_told_and_refused_when_strict(trainer: Trainer) -> None:
    rows = prompt_rows(4)
    training = await trainer.registry.create_file(rows.splitlines(keepends=True)[0] * 8)
    validation = await trainer.registry.create_file(rows)
    request = trainer_service_pb2.ValidateDatasetRequest(
        base_model=BASE, training_file=training.id, validation_file=validation.id, spec=spec()
    )
    report = await trainer.call("ValidateDataset", request)
    assert (report.duplicate_rows, report.overlap_rows) == (7, 1)
    assert [warning.partition(" ")[0] for warning in report.warnings] == ["7", "1"]
    request.spec.strict = True
    with pytest.raises(LorafleetError) as caught:
        await trainer.call("ValidateDataset", request)
    assert caught.value.violations[0].reason == "train_validation_overlap"
    job = await trainer.create(
        b"{}\n", request.spec, training_file=training.id, validation_file=validation.id
    )
    failed = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED)
    assert "also in training_file" in failed.error.message


async def test_jobs_that_wait_train_together_and_each_ends_by_itself(trainer: Trainer) -> None:
    blocker = await trainer.create(prompt_rows(64), LONG)
    await trainer.past_step(blocker.id, 1)
    together = spec(n_epochs=20, batch_size=2, evaluation_rows=0, validation_fraction=0.0)
    jobs = [await trainer.create(prompt_rows(16), together, seed=seed) for seed in range(4)]
    for job in jobs:
        await trainer.until(job.id, job_pb2.JOB_STATE_QUEUED)
    await trainer.cancel(blocker.id)
    await trainer.past_step(jobs[0].id, 2)
    assert len(trainer.children()) == 1
    await trainer.cancel(jobs[1].id)
    states = [
        (await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_CANCELLED)).state
        for job in jobs
    ]
    succeeded, cancelled = job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_CANCELLED
    assert states == [succeeded, cancelled, succeeded, succeeded]
    started = [event.message for event in await trainer.events(jobs[0].id) if "started" in event.message]
    assert started == ["Fine-tuning job started, together with 3 other jobs"]


async def test_jobs_in_work_are_measured(place: Place) -> None:
    trainer = place.trainer
    job = await trainer.create(prompt_rows(64), LONG, adapter="measured")
    await trainer.past_step(job.id, 3)
    shown = await asyncio.to_thread(_metrics, place.metrics_url)
    (step,) = [line for line in shown if line.startswith("lorafleet_trainer_job_step{")]
    assert f'job="{job.id}"' in step
    assert 'adapter="measured"' in step
    assert float(step.rpartition(" ")[2]) > 3
    names = {line.partition("{")[0] for line in shown if f'job="{job.id}"' in line}
    assert len(names) == 8
    await trainer.cancel(job.id)
    await trainer.until(job.id, job_pb2.JOB_STATE_CANCELLED)
    shown = await asyncio.to_thread(_metrics, place.metrics_url)
    assert not [line for line in shown if job.id in line], "its series end with its run"
    assert [line for line in shown if line.startswith("lorafleet_trainer_jobs_ended_total{")]


def _metrics(url: str) -> list[str]:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
        return str(answer.read().decode("utf-8")).splitlines()
