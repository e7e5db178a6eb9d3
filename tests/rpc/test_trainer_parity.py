"""The parity gate between a real trainer and a real inference service."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import adapter_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common.channels import open_channel
from services.common.errors import Code, DeadlineExceeded, LorafleetError, NotFound
from services.trainer.parity import CANDIDATE_TENANT, ParityGate, Probe, compare
from services.trainer.registry_client import RegistryClient
from tests.support.inference import InferenceClient, running_inference, settings_for, until_served
from tests.support.models import make_peft_adapter, make_tiny_llama
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

# A scale of 5 / 4 is folded into B with a rounding, so that serving and training cannot agree to the last
# bit.
SPEC = spec(n_epochs=2, batch_size=4, validation_fraction=0.25, alpha=5.0)
EXACT_MATCH = job_pb2.TASK_METRIC_EXACT_MATCH


@asynccontextmanager
async def trainer_and_inference(place: TrainerPlace, served: Path, **changes: str) -> AsyncIterator[Trainer]:
    async with registry_host(place) as registry:
        settings = settings_for(
            served, place.folder / "cache", registry, base_name=served.name, quantization="nf4"
        )
        async with (
            running_inference(settings) as (_, inference),
            running_trainer(place, registry, INFERENCE_TARGET=inference, **changes) as trainer,
        ):
            yield trainer


async def test_a_version_is_published_once_serving_agrees(place: TrainerPlace) -> None:
    async with trainer_and_inference(place, place.base) as trainer:
        job = await trainer.create(prompt_rows(40), SPEC, adapter="digits")
        job = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED)
        parity = job.result.parity
        assert parity.rows == 8
        assert parity.tokens > 8
        assert 0 < parity.max_difference < parity.tolerance == pytest.approx(1e-3)
        # The weights moved, so agreement is about the adapter and not about the base alone.
        (loss,) = (figure for figure in job.result.evaluation if figure.name == "loss")
        assert loss.adapter_value < loss.base_value - 0.1
        assert loss.lift_ci_high < 0
        version = await trainer.registry.call(
            trainer.registry.adapters.ResolveVersion, adapter_pb2.ResolveVersionRequest(ref="digits")
        )
        (metric,) = (m for m in version.card.metrics if m.name == "parity_max_difference")
        assert metric.value == parity.max_difference
        assert await candidates(trainer) == []


async def test_a_version_that_serves_otherwise_is_not_published(place: TrainerPlace) -> None:
    # No two programs agree to so many digits.
    async with trainer_and_inference(place, place.base, PARITY_TOLERANCE_NATS="1e-12") as trainer:
        job = await trainer.create(prompt_rows(40), SPEC, adapter="digits")
        job = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED, seconds=200)
        assert "differs by" in job.error.message
        assert re.search(r"at most 1e-12", job.error.message)
        assert job.result.parity.max_difference > 1e-12, "the report is kept"
        with pytest.raises(NotFound):
            await trainer.registry.call(
                trainer.registry.adapters.ResolveVersion, adapter_pb2.ResolveVersionRequest(ref="digits")
            )
        assert await candidates(trainer) == []


async def test_another_base_is_not_compared(place: TrainerPlace, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=9)
    async with trainer_and_inference(place, other) as trainer:
        job = await trainer.create(prompt_rows(40), SPEC, adapter="digits")
        job = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED)
        assert not job.result.HasField("parity")
        warnings = [e.message for e in await trainer.events(job.id) if e.level == job_pb2.EVENT_LEVEL_WARN]
        assert any("another base" in text for text in warnings)


@pytest.mark.timeout(300)
async def test_a_checkpoint_passes_the_same_gate(place: TrainerPlace) -> None:
    asked = spec(n_epochs=2, batch_size=4, validation_fraction=0.25, alpha=5.0, task_metric=EXACT_MATCH)
    async with registry_host(place) as registry:
        settings = settings_for(
            place.base, place.folder / "cache", registry, base_name=BASE, quantization="nf4"
        )
        async with running_inference(settings) as (_, inference):
            async with running_trainer(
                place, registry, INFERENCE_TARGET=inference, PARITY_TOLERANCE_NATS="1e-12"
            ) as trainer:
                job = await trainer.create(prompt_rows(40), asked, adapter="digits")
                failed = await trainer.until(job.id, job_pb2.JOB_STATE_FAILED, seconds=200)
                listing = trainer_service_pb2.ListCheckpointsRequest(job_id=job.id)
                (last,) = (await trainer.call("ListCheckpoints", listing)).checkpoints
                ask = trainer_service_pb2.PublishCheckpointRequest(
                    job_id=job.id, checkpoint_id=last.id, adapter="early"
                )
                with pytest.raises(LorafleetError) as caught:
                    await published(trainer, ask)
                assert (caught.value.reason, caught.value.code) == (
                    "parity_failed",
                    Code.FAILED_PRECONDITION,
                )
                (refused,) = (await trainer.call("ListCheckpoints", listing)).checkpoints
                # The weights are those of the job that failed, and so is what was measured of them.
                assert refused.parity == failed.result.parity
                assert list(refused.evaluation) == list(failed.result.evaluation)
                assert refused.fine_tuned_model == ""
                assert await versions(trainer, "early") == []
                assert len(measurings(place, job.id)) == 1
            async with running_trainer(place, registry, INFERENCE_TARGET=inference) as trainer:
                # Measured anew, now that other services agree as far as is asked.
                made = await published(trainer, ask)
                assert made.fine_tuned_model.endswith(":early:v1")
                assert made.parity.tolerance == pytest.approx(1e-3)
                assert made.parity.max_difference == refused.parity.max_difference
                (version,) = await versions(trainer, "early")
                assert await candidates(trainer) == []
    measured = {(metric.name, metric.subject): metric.value for metric in version.card.metrics}
    assert measured["parity_max_difference", "adapter"] == made.parity.max_difference
    for figure in failed.result.evaluation:
        assert measured[figure.name, "base"] == figure.base_value
        assert measured[figure.name, "adapter"] == figure.adapter_value
    assert {figure.name for figure in failed.result.evaluation} == {"loss", "token_accuracy", "exact_match"}


async def published(
    trainer: Trainer, ask: trainer_service_pb2.PublishCheckpointRequest
) -> job_pb2.Checkpoint:
    """The answer to a call that may outlast its time: the same again waits for the same work."""
    while True:
        try:
            checkpoint: job_pb2.Checkpoint = await trainer.call("PublishCheckpoint", ask)
        except DeadlineExceeded:
            continue
        return checkpoint


def measurings(place: TrainerPlace, job_id: str) -> list[Path]:
    """What the trainer has kept of the times that the job's checkpoints were to be published."""
    return list((place.folder / "store" / "trainer" / "jobs" / job_id / "publications").iterdir())


async def versions(trainer: Trainer, adapter: str) -> list[adapter_pb2.AdapterVersion]:
    try:
        request = adapter_pb2.ListVersionsRequest(adapter=adapter)
        return list((await trainer.registry.call(trainer.registry.adapters.ListVersions, request)).versions)
    except NotFound:
        return []


def test_one_token_apart_is_found() -> None:
    probes = [Probe((1, 2, 3), (-1.0, -2.0)), Probe((4, 5), (-0.5,))]
    report = compare(probes, [[-1.0, -2.25], [-0.5]], 0.1)
    assert (report.rows, report.tokens) == (2, 3)
    assert report.max_difference == pytest.approx(0.25)
    assert report.mean_difference == pytest.approx(0.25 / 3)
    assert not report.holds
    assert not compare(probes, [[-1.0, float("nan")], [-0.5]], 0.1).holds


async def candidates(trainer: Trainer) -> list[str]:
    client = trainer.registry.as_tenant(CANDIDATE_TENANT)
    listed = await client.call(client.adapters.ListAdapters, adapter_pb2.ListAdaptersRequest())
    return [adapter.name for adapter in listed.adapters if adapter.HasField("latest_version")]


async def test_the_gate_can_be_asked_again(place: TrainerPlace, tmp_path: Path) -> None:
    """As after an inference service that went away in the middle: the candidate of before is gone."""
    folder = make_peft_adapter(place.base, tmp_path / "adapter", r=4)
    async with registry_host(place) as address:
        settings = settings_for(place.base, tmp_path / "cache", address, base_name=BASE, quantization="nf4")
        async with running_inference(settings) as (_, inference):
            registry = RegistryClient(address)
            gate = ParityGate(inference, registry, tolerance_nats=1.0)
            probes = [Probe((10, 11, 12), (-1.0, -1.0))]
            try:
                async with open_channel(inference) as channel:
                    digest = await until_served(InferenceClient(InferenceServiceStub(channel)))
                reports = [
                    await gate.check(folder, probes, name="ftjob-again", base_fingerprint_digest=digest)
                    for _ in range(2)
                ]
            finally:
                await gate.close()
                await registry.close()
    assert reports[0] == reports[1]
    assert reports[0] is not None
    assert reports[0].tokens == 2
