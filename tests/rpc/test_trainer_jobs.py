"""Jobs over gRPC: a real trainer process, registry, Valkey, directory store and NF4 base."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from google.rpc import error_details_pb2

from lorafleet.registry.v1 import adapter_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common.base_loading import load_base_model
from services.common.errors import LorafleetError
from services.common.prompts import PromptEncoder
from services.common.valkey import EmbeddedValkey
from services.trainer.config import TrainerSettings
from services.trainer.preparation import prepare
from services.trainer.spec import TrainingSpec
from tests.support.models import load_peft_adapters, make_tiny_llama
from tests.support.trainer import (
    BASE,
    FINAL,
    TENANT,
    Trainer,
    TrainerPlace,
    losses,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)

# One trainer for the whole file: starting one takes seconds.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / BASE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Trainer]:
    folder = tmp_path_factory.mktemp("trainer")
    with EmbeddedValkey.start(folder / "valkey") as valkey:
        place = TrainerPlace(base, folder, valkey.url)
        async with registry_host(place) as registry, running_trainer(place, registry) as running:
            yield running


async def test_job_from_file_to_published_version(trainer: Trainer, base: Path, tmp_path: Path) -> None:
    data = prompt_rows(24)
    asked = spec(
        task_metric=job_pb2.TASK_METRIC_EXACT_MATCH, checkpoint_steps=5, n_epochs=4, validation_fraction=0.25
    )
    job = await trainer.create(data, asked, adapter="digits", metadata={"team": "a"})
    assert job.state == job_pb2.JOB_STATE_VALIDATING_FILES
    events = [event async for event in trainer.watch(job.id)]
    job = await trainer.job(job.id)
    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job

    # Events: numbered without a gap, also when the watch begins again in the middle.
    own = job.id.partition("-")[2]
    assert [event.id for event in events] == [f"ftevent-{own}-{n}" for n in range(1, len(events) + 1)]
    assert [event async for event in trainer.watch(job.id, after=events[4].id)] == events[5:]
    assert await trainer.events(job.id) == events
    states = [event.state for event in events if event.state]
    assert states == [
        job_pb2.JOB_STATE_VALIDATING_FILES,
        job_pb2.JOB_STATE_QUEUED,
        job_pb2.JOB_STATE_RUNNING,
        job_pb2.JOB_STATE_SUCCEEDED,
    ]

    # Training: the loss falls, and base and adapter are told apart.
    assert losses(events)[-1] < losses(events)[0] / 2
    assert (job.dataset.rows, job.dataset.validation_rows) == (18, 6)
    assert (job.progress.step, job.progress.total_steps, job.attempts) == (20, 20, 1)
    assert job.trained_tokens == job.dataset.tokens * 4 == job.estimate.tokens
    assert job.estimate.minutes > 0
    measured = {metric.name: metric for metric in job.result.evaluation}
    assert set(measured) == {"loss", "token_accuracy", "exact_match"}
    assert measured["loss"].adapter_value < measured["loss"].base_value / 2
    assert measured["loss"].ci_low <= measured["loss"].adapter_value <= measured["loss"].ci_high

    # Checkpoints, newest first; the last one is what was published.
    listed = await trainer.call(
        "ListCheckpoints", trainer_service_pb2.ListCheckpointsRequest(job_id=job.id, page_size=3)
    )
    rest = await trainer.call(
        "ListCheckpoints",
        trainer_service_pb2.ListCheckpointsRequest(job_id=job.id, page_token=listed.next_page_token),
    )
    checkpoints = [*listed.checkpoints, *rest.checkpoints]
    assert [checkpoint.step for checkpoint in checkpoints] == [20, 15, 10, 5]
    assert checkpoints[0].fine_tuned_model == job.result.fine_tuned_model
    assert checkpoints[0].valid_loss == pytest.approx(measured["loss"].adapter_value)

    # The version: one, with a complete card, and PEFT measures with its files what the trainer measured.
    assert job.result.fine_tuned_model == f"ft:{BASE}:{TENANT}:digits:v1"
    versions = await trainer.registry.call(
        trainer.registry.adapters.ListVersions, adapter_pb2.ListVersionsRequest(adapter="digits")
    )
    (version,) = versions.versions
    _assert_complete_card(version.card, job)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in version.files:
        (folder / file.name).write_bytes(await trainer.registry.download("digits", file.name))
    (tmp_path / "data.jsonl").write_bytes(data)
    assert _loss_by_peft(base, folder, tmp_path / "data.jsonl") == pytest.approx(
        measured["loss"].adapter_value, rel=1e-5
    )

    # The result file: a row per step.
    table = await trainer.registry.download_file(job.result.result_files[0])
    rows = list(csv.DictReader(io.StringIO(table.decode("ascii"))))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert float(rows[-1]["train_loss"]) == pytest.approx(job.progress.loss, rel=1e-6)
    assert [row["step"] for row in rows if row["valid_loss"]] == ["5", "10", "15", "20"]


def _assert_complete_card(card: adapter_pb2.ModelCard, job: job_pb2.Job) -> None:
    assert (card.base_model, card.method, card.seed, card.job_id) == (BASE, "lora", 7, job.id)
    assert card.training_data_digest == job.dataset.digest
    assert (card.training_rows, card.trained_tokens) == (18, job.trained_tokens)
    assert list(card.stop_token_ids) == [0]
    assert {"torch", "transformers", "peft", "bitsandbytes"} <= set(card.libraries)
    fields = {field.name for field in job_pb2.TrainingSpec.DESCRIPTOR.fields} - {"method"}
    assert set(card.hyperparameters) == fields
    assert card.hyperparameters["learning_rate"] == "0.01"
    subjects = {(metric.name, metric.subject) for metric in card.metrics}
    assert ("loss", "base") in subjects
    assert ("exact_match", "adapter") in subjects
    assert ("conversion_error", "adapter") in subjects


def _loss_by_peft(base: Path, adapter: Path, data: Path) -> float:
    """The loss on the held-out rows, of an NF4 base with the adapter loaded by PEFT."""
    torch.set_num_threads(1)
    quantization = TrainerSettings.model_construct(
        quantization="nf4", compute_dtype="float32", device="cpu"
    ).base_quantization
    training_spec = TrainingSpec(max_seq_len=64, validation_fraction=0.25)
    tokens = data.with_name("tokens")
    prepared = prepare(data, None, PromptEncoder.load(base), training_spec, seed=7, folder=tokens)
    plain = load_base_model(base, quantization, device=torch.device("cpu"), attention="sdpa")
    model = load_peft_adapters(plain, {"a": adapter})
    loss, count = 0.0, 0
    for row in prepared.validation:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        counts = torch.tensor(row.supervised[1:])
        loss -= float(scores[counts].gather(1, torch.tensor(row.ids[1:])[counts, None]).sum())
        count += int(counts.sum())
    return loss / count


async def test_row_46_bad_lines_end_the_job_and_are_named(trainer: Trainer) -> None:
    data = prompt_rows(3) + b'{"prompt": "a"}\nnot json\n'
    job = await trainer.create(data, spec())
    events = [event async for event in trainer.watch(job.id)]
    job = await trainer.job(job.id)
    assert job.state == job_pb2.JOB_STATE_FAILED
    assert events[-1].level == job_pb2.EVENT_LEVEL_ERROR
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert job.error.details[0].Unpack(info)
    assert job.error.details[1].Unpack(bad_request)
    assert info.reason == "invalid_dataset"
    named = [(violation.field, violation.reason) for violation in bad_request.field_violations]
    assert named == [
        ("training_file.lines[4].completion", "bad_completion"),
        ("training_file.lines[5]", "bad_json_line"),
    ]


async def test_dataset_is_checked_without_a_job(trainer: Trainer) -> None:
    data = prompt_rows(10) + prompt_rows(2)
    file = await trainer.registry.create_file(data)
    other = await trainer.registry.create_file(prompt_rows(12)[-60:].split(b"\n", 1)[1])
    request = trainer_service_pb2.ValidateDatasetRequest(
        base_model=BASE, training_file=file.id, validation_file=other.id, spec=spec()
    )
    report = await trainer.call("ValidateDataset", request)
    assert (report.rows, report.validation_rows, report.duplicate_rows) == (12, 1, 2)
    assert report.schema == "prompt_completion"
    assert report.digest == file.digest
    bad = await trainer.registry.create_file(b"{}\n")
    request.training_file = bad.id
    with pytest.raises(LorafleetError) as caught:
        await trainer.call("ValidateDataset", request)
    assert caught.value.reason == "invalid_dataset"
    assert caught.value.violations[0].field == "training_file.lines[1]"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"base_model": "no-such-base"}, "base_not_found"),
    ({"training_file": "file-00000000000000000000000000"}, "file_not_found"),
    ({"training_file": "../etc/passwd"}, "file_not_found"),
    ({"validation_file": "nothing"}, "file_not_found"),
    ({"adapter": "No Such Name"}, "bad_name"),
    ({"seed": -1}, "bad_hyperparameter"),
    ({"spec": spec(rank=4096)}, "bad_hyperparameter"),
    ({"spec": spec(method="oft")}, "unsupported_method"),
    ({"metadata": {"k" * 65: "v"}}, "bad_metadata"),
    ({"metadata": {f"k{n}": "v" for n in range(17)}}, "bad_metadata"),
    ({"idempotency_key": "k" * 65}, "bad_idempotency_key"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED)
async def test_request_is_refused_by_name(trainer: Trainer, fields: dict[str, Any], reason: str) -> None:
    before = await trainer.call("ListJobs", trainer_service_pb2.ListJobsRequest(page_size=1000))
    with pytest.raises(LorafleetError) as caught:
        await trainer.create(prompt_rows(4), **fields)
    assert caught.value.reason == reason
    after = await trainer.call("ListJobs", trainer_service_pb2.ListJobsRequest(page_size=1000))
    assert len(after.jobs) == len(before.jobs)


async def test_result_files_cannot_be_trained_on(trainer: Trainer) -> None:
    file = await trainer.registry.create_file(prompt_rows(4), purpose=2)
    with pytest.raises(LorafleetError) as caught:
        await trainer.create(b"{}\n", training_file=file.id)
    assert caught.value.reason == "bad_purpose"


async def test_row_57_same_idempotency_key_gives_the_same_job(trainer: Trainer) -> None:
    file = await trainer.registry.create_file(b"no rows")
    fields = {"training_file": file.id, "idempotency_key": "submit-1"}
    first = await trainer.create(b"{}\n", spec(), **fields)
    assert (await trainer.create(b"{}\n", spec(), **fields)).id == first.id
    with pytest.raises(LorafleetError) as caught:
        await trainer.create(b"{}\n", spec(rank=8), **fields)
    assert caught.value.reason == "idempotency_key_reused"


async def test_jobs_are_listed_by_tenant_state_and_metadata(trainer: Trainer) -> None:
    ids = [(await trainer.create(b"bad", metadata={"list": str(n % 2)})).id for n in range(4)]
    for job_id in ids:
        await trainer.until(job_id, job_pb2.JOB_STATE_FAILED)
    request = trainer_service_pb2.ListJobsRequest(
        page_size=1, state=job_pb2.JOB_STATE_FAILED, metadata={"list": "1"}
    )
    found = []
    while True:
        page = await trainer.call("ListJobs", request)
        found += [job.id for job in page.jobs]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert found == sorted([ids[1], ids[3]], reverse=True)
    for bad, reason in (({"page_size": 1001}, "bad_page_size"), ({"page_token": "x"}, "bad_page_token")):
        with pytest.raises(LorafleetError) as caught:
            await trainer.call("ListJobs", trainer_service_pb2.ListJobsRequest(**bad))
        assert caught.value.reason == reason
    stranger = Trainer(trainer.stub, trainer.registry, trainer.process, tenant="stranger")
    assert not (await stranger.call("ListJobs", trainer_service_pb2.ListJobsRequest())).jobs
    with pytest.raises(LorafleetError) as caught:
        await stranger.job(ids[0])
    assert caught.value.reason == "job_not_found"


async def test_unknown_jobs_and_events_are_not_found(trainer: Trainer) -> None:
    job = await trainer.create(b"bad")
    own = job.id.partition("-")[2]
    for job_id, after, reason in (
        ("ftjob-00000000000000000000000000", "", "job_not_found"),
        ("nonsense", "", "job_not_found"),
        (job.id, "ftevent-1", "event_not_found"),
        (job.id, f"ftevent-{own}-999", "event_not_found"),
    ):
        with pytest.raises(LorafleetError) as caught:
            await anext(trainer.watch(job_id, after))
        assert caught.value.reason == reason


async def test_row_63_cancel_within_five_seconds_and_the_next_job_runs(trainer: Trainer) -> None:
    # Minutes of training; each by itself, or the second would train beside the first.
    long = spec(n_epochs=50, batch_size=1, joint=False)
    first = await trainer.create(prompt_rows(200), long, adapter="never")
    second = await trainer.create(prompt_rows(200), long, adapter="never")
    third = await trainer.create(prompt_rows(8), spec(n_epochs=1, evaluation_rows=0), adapter="after")
    await trainer.until(second.id, job_pb2.JOB_STATE_QUEUED)
    stream = trainer.watch(first.id)
    async for event in stream:
        if event.HasField("metrics"):
            break

    # The service answers while its child trains.
    slowest = 0.0
    for _ in range(10):
        started = time.monotonic()
        await trainer.job(first.id)
        slowest = max(slowest, time.monotonic() - started)
    assert slowest < 10.0
    assert (await trainer.job(second.id)).state == job_pb2.JOB_STATE_QUEUED

    assert (await trainer.cancel(second.id)).state == job_pb2.JOB_STATE_CANCELLED
    started = time.monotonic()
    assert (await trainer.cancel(first.id)).state in (
        job_pb2.JOB_STATE_CANCELLING,
        job_pb2.JOB_STATE_CANCELLED,
    )
    rest = [event async for event in stream]
    assert time.monotonic() - started < 20.0
    assert rest[-1].state == job_pb2.JOB_STATE_CANCELLED
    assert (await trainer.cancel(first.id)).state == job_pb2.JOB_STATE_CANCELLED

    done = await trainer.until(third.id, job_pb2.JOB_STATE_SUCCEEDED)
    assert done.result.version == 1
    with pytest.raises(LorafleetError) as caught:
        await trainer.cancel(third.id)
    assert caught.value.reason == "already_finished"
    names = await trainer.registry.call(
        trainer.registry.adapters.ListAdapters, adapter_pb2.ListAdaptersRequest(name_contains="never")
    )
    assert not names.adapters
    assert (await trainer.job(first.id)).state in FINAL


async def test_conversations_train_and_unserved_methods_are_not_offered(trainer: Trainer) -> None:
    methods = await trainer.call("ListMethods", trainer_service_pb2.ListMethodsRequest())
    offered = {method.method: method.served_as for method in methods.methods if method.offered}
    assert offered["rslora"] == "lora"
    assert offered["dora"] == "lora+scale"
    refused = {method.method: method.note for method in methods.methods if not method.offered}
    assert all(refused.values())
    assert "oft" in refused
    rows = b"".join(
        b'{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a"}]}\n' % n
        for n in range(12)
    )
    job = await trainer.create(rows, spec(method="rslora", n_epochs=1, gradient_checkpointing=True))
    done = await trainer.until(job.id, job_pb2.JOB_STATE_SUCCEEDED)
    assert done.dataset.schema == "messages"
    assert done.adapter == job.id
    version = await trainer.registry.resolve(job.id)
    assert version.card.method == "rslora"
