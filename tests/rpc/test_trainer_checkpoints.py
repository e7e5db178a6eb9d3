"""Checkpoints published by themselves, of jobs in every state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio
from safetensors.torch import load

from lorafleet.registry.v1 import adapter_pb2, file_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common.errors import Code, DeadlineExceeded, LorafleetError
from services.common.valkey import EmbeddedValkey
from tests.support.models import make_tiny_llama
from tests.support.trainer import (
    BASE,
    TENANT,
    Trainer,
    TrainerPlace,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)

# One trainer for the whole file: starting one takes seconds.
pytestmark = pytest.mark.asyncio(loop_scope="module")

SHORT = spec(n_epochs=4, batch_size=5, checkpoint_steps=4, validation_fraction=0.17, evaluation_rows=0)
# Longer than any of these tests looks at it.
LONG = spec(n_epochs=50, batch_size=1, validation_fraction=0.0, checkpoint_steps=1000, joint=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[TrainerPlace]:
    folder = tmp_path_factory.mktemp("trainer")
    base = make_tiny_llama(folder / BASE)
    with EmbeddedValkey.start(folder / "valkey") as valkey:
        yield TrainerPlace(base, folder, valkey.url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(place: TrainerPlace) -> AsyncIterator[Trainer]:
    async with registry_host(place) as registry, running_trainer(place, registry) as running:
        yield running


async def checkpoints(trainer: Trainer, job_id: str) -> list[job_pb2.Checkpoint]:
    request = trainer_service_pb2.ListCheckpointsRequest(job_id=job_id)
    return list((await trainer.call("ListCheckpoints", request)).checkpoints)


async def publish(trainer: Trainer, job_id: str, checkpoint_id: str, adapter: str = "") -> job_pb2.Checkpoint:
    request = trainer_service_pb2.PublishCheckpointRequest(
        job_id=job_id, checkpoint_id=checkpoint_id, adapter=adapter
    )
    while True:
        try:
            checkpoint: job_pb2.Checkpoint = await trainer.call("PublishCheckpoint", request)
        except DeadlineExceeded:
            # The work goes on; the same call again waits for it.
            continue
        return checkpoint


async def versions(trainer: Trainer, adapter: str) -> list[adapter_pb2.AdapterVersion]:
    request = adapter_pb2.ListVersionsRequest(adapter=adapter)
    return list((await trainer.registry.call(trainer.registry.adapters.ListVersions, request)).versions)


async def started(trainer: Trainer, adapter: str) -> str:
    """A job that trains, and has done some steps."""
    job = await trainer.create(prompt_rows(200), LONG, adapter=adapter)
    async for event in trainer.watch(job.id):
        if event.metrics.step > 3:
            return job.id
    pytest.fail(f"the job ended: {await trainer.job(job.id)}")


async def test_checkpoints_of_a_succeeded_job(trainer: Trainer, place: TrainerPlace) -> None:
    job = await trainer.create(prompt_rows(24), SHORT, adapter="done")
    job = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED)
    last, middle, first, *_ = listed = await checkpoints(trainer, job.id)
    assert [each.step for each in listed] == [16, 12, 8, 4]

    # The one before the last becomes a version, with the figures of its own step; one, however often asked.
    made, *same = await asyncio.gather(*(publish(trainer, job.id, middle.id, "early") for _ in range(3)))
    assert same == [made, made]
    assert made.fine_tuned_model == f"ft:{BASE}:{TENANT}:early:v1"
    assert (made.id, made.step, made.valid_loss) == (middle.id, 12, middle.valid_loss)
    (version,) = await versions(trainer, "early")
    card = version.card
    assert (card.job_id, card.method, card.training_data_digest) == (job.id, "lora", job.dataset.digest)
    assert 0 < card.trained_tokens < job.trained_tokens
    measured = {metric.name: metric.value for metric in card.metrics}
    assert measured["loss"] == middle.valid_loss
    assert measured["token_accuracy"] == pytest.approx(middle.valid_mean_token_accuracy)
    assert "step 12" in card.description
    assert set(measured) == {"loss", "token_accuracy", "conversion_error"}

    # The last one's weights are those that the job published.
    again = await publish(trainer, job.id, last.id, "again")
    assert again.fine_tuned_model == f"ft:{BASE}:{TENANT}:again:v1"
    assert (await versions(trainer, "again"))[0].digest == job.result.digest
    assert version.digest != job.result.digest
    tensors = load(await trainer.registry.download("early", "adapter_model.safetensors"))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    config = json.loads(await trainer.registry.download("early", "adapter_config.json"))
    assert (config["r"], config["base_model_name_or_path"]) == (4, BASE)

    # It stays so, also after the index was lost; and the job's own version is not made again.
    assert (await publish(trainer, job.id, last.id)).fine_tuned_model == job.result.fine_tuned_model
    async with redis.asyncio.Redis.from_url(place.redis_url) as client:
        keys = [key async for key in client.scan_iter("trainer:*")]
        await client.delete(*keys)
    assert await publish(trainer, job.id, middle.id, "early") == made
    assert [len(await versions(trainer, name)) for name in ("early", "done")] == [1, 1]
    names = {each.step: each.fine_tuned_model for each in await checkpoints(trainer, job.id)}
    assert names == {
        16: job.result.fine_tuned_model, 12: made.fine_tuned_model, 8: "", 4: "",
    }  # fmt: skip

    # Two are kept, without what only resuming needs.
    with pytest.raises(LorafleetError) as caught:
        await publish(trainer, job.id, first.id)
    assert (caught.value.reason, caught.value.code) == ("checkpoint_discarded", Code.FAILED_PRECONDITION)
    kept = {path.parent.name: path.name for path in stored(place, job.id) if path.name != "manifest.json"}
    assert kept == {each.id: "weights.safetensors" for each in (last, middle)}


async def test_checkpoint_of_a_job_that_is_paused_runs_and_is_cancelled(trainer: Trainer) -> None:
    job_id = await started(trainer, "moving")
    await trainer.call("PauseJob", trainer_service_pb2.PauseJobRequest(job_id=job_id))
    await trainer.until(job_id, job_pb2.JOB_STATE_PAUSED)
    (only,) = await checkpoints(trainer, job_id)
    paused = await publish(trainer, job_id, only.id)
    assert paused.fine_tuned_model == f"ft:{BASE}:{TENANT}:moving:v1"

    # Its worker holds the job; what it records meanwhile loses nothing of the publication.
    before = await trainer.events(job_id)
    await trainer.call("ResumeJob", trainer_service_pb2.ResumeJobRequest(job_id=job_id))
    await trainer.until(job_id, job_pb2.JOB_STATE_RUNNING)
    running = await publish(trainer, job_id, only.id, "while-running")
    assert running.fine_tuned_model == f"ft:{BASE}:{TENANT}:while-running:v1"
    async for event in trainer.watch(job_id, after=before[-1].id):
        if event.metrics.step > only.step + 3:
            break
    assert (await checkpoints(trainer, job_id))[-1].fine_tuned_model == running.fine_tuned_model
    assert (await trainer.job(job_id)).state == job_pb2.JOB_STATE_RUNNING

    await trainer.cancel(job_id)
    await trainer.until(job_id, job_pb2.JOB_STATE_CANCELLED)
    cancelled = await publish(trainer, job_id, only.id, "after-all")
    assert cancelled.fine_tuned_model == f"ft:{BASE}:{TENANT}:after-all:v1"
    digests = {(await versions(trainer, name))[0].digest for name in ("moving", "while-running", "after-all")}
    assert len(digests) == 1


async def test_checkpoint_of_a_failed_job(trainer: Trainer) -> None:
    asked = spec(n_epochs=20, batch_size=4, checkpoint_steps=2, validation_fraction=0.0, token_budget=200)
    job = await trainer.create(prompt_rows(24), asked, adapter="spent")
    failed = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED)
    assert "token_budget" in failed.error.message
    newest = (await checkpoints(trainer, job.id))[0]
    made = await publish(trainer, job.id, newest.id)
    assert made.fine_tuned_model == f"ft:{BASE}:{TENANT}:spent:v1"
    (version,) = await versions(trainer, "spent")
    assert version.card.trained_tokens == failed.trained_tokens
    assert {metric.name for metric in version.card.metrics} == {"conversion_error"}


async def test_a_checkpoint_is_evaluated_like_the_job(trainer: Trainer, place: TrainerPlace) -> None:
    asked = spec(n_epochs=2, batch_size=5, checkpoint_steps=2, validation_fraction=0.2)
    job = await trainer.create(prompt_rows(25), asked, adapter="measured")
    job = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED)
    last, before, *_ = await checkpoints(trainer, job.id)
    made = await publish(trainer, job.id, before.id, "half-way")
    figures = {figure.name: figure for figure in made.evaluation}
    at_the_end = {figure.name: figure for figure in job.result.evaluation}
    assert set(figures) == {"loss", "token_accuracy"}
    assert figures["loss"].base_value == at_the_end["loss"].base_value
    # Its own weights were measured: over all held-out rows this is the loss that training noted for it.
    assert figures["loss"].adapter_value == pytest.approx(before.valid_loss, rel=1e-4)
    assert figures["loss"].adapter_value != at_the_end["loss"].adapter_value
    assert figures["loss"].ci_low < figures["loss"].adapter_value < figures["loss"].ci_high
    assert not made.HasField("parity"), "no inference service is named"
    (version,) = await versions(trainer, "half-way")
    card = {(metric.name, metric.subject): metric for metric in version.card.metrics}
    assert card["loss", "adapter"].value == figures["loss"].adapter_value
    assert card["loss", "base"].value == figures["loss"].base_value
    assert len(card) == len(version.card.metrics)

    async with redis.asyncio.Redis.from_url(place.redis_url) as client:
        await client.delete(*[key async for key in client.scan_iter("trainer:*")])
    assert (await checkpoints(trainer, job.id))[1] == made
    # The same rows are needed again.
    await trainer.registry.call(
        trainer.registry.files.DeleteFile, file_pb2.DeleteFileRequest(file_id=job.training_file)
    )
    with pytest.raises(LorafleetError) as caught:
        await publish(trainer, job.id, last.id, "without-rows")
    assert (caught.value.reason, caught.value.code) == ("file_not_found", Code.NOT_FOUND)


async def test_what_cannot_be_published_is_refused_by_name(trainer: Trainer, place: TrainerPlace) -> None:
    job = await trainer.create(prompt_rows(24), SHORT, adapter="refused")
    job = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED)
    newest = (await checkpoints(trainer, job.id))[0]
    stranger = Trainer(trainer.stub, trainer.registry, trainer.process, tenant="stranger")
    for caller, job_id, checkpoint_id, adapter, reason in (
        (trainer, "ftjob-00000000000000000000000000", newest.id, "", "job_not_found"),
        (stranger, job.id, newest.id, "", "job_not_found"),
        (trainer, job.id, "ftckpt-00000000000000000000000000", "", "checkpoint_not_found"),
        (trainer, job.id, "../weights", "", "checkpoint_not_found"),
        (trainer, job.id, newest.id, "No Such Name", "bad_name"),
    ):
        with pytest.raises(LorafleetError) as caught:
            await publish(caller, job_id, checkpoint_id, adapter)
        assert caught.value.reason == reason
    (weights,) = [
        path for path in stored(place, job.id) if path.name.startswith("weights") and newest.id in path.parts
    ]
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(LorafleetError) as caught:
        await publish(trainer, job.id, newest.id, "broken")
    assert (caught.value.reason, caught.value.code) == ("corrupt_checkpoint", Code.DATA_LOSS)


async def test_patience_without_held_out_rows_is_refused(trainer: Trainer) -> None:
    asked = spec(early_stopping_patience=2, validation_fraction=0.0)
    with pytest.raises(LorafleetError) as caught:
        await trainer.create(prompt_rows(8), asked)
    assert (caught.value.reason, caught.value.field) == (
        "bad_hyperparameter",
        "spec.early_stopping_patience",
    )
    file = await trainer.registry.create_file(prompt_rows(4))
    request = trainer_service_pb2.ValidateDatasetRequest(base_model=BASE, training_file=file.id, spec=asked)
    with pytest.raises(LorafleetError) as caught:
        await trainer.call("ValidateDataset", request)
    assert caught.value.field == "spec.early_stopping_patience"
    job = await trainer.create(prompt_rows(8), asked, validation_file=file.id)
    await trainer.cancel(job.id)


def stored(place: TrainerPlace, job_id: str) -> list[Path]:
    """The files of the job's checkpoints in the store."""
    folder = place.folder / "store" / "trainer" / "jobs" / job_id / "checkpoints"
    return [path for path in folder.rglob("*") if path.is_file()]
