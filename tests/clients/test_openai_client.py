"""The stock `openai` client, changed in nothing but its base URL and key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from lorafleet.trainer.v1.job_pb2 import Checkpoint, Progress
from services.common.errors import ResourceExhausted, Unavailable
from services.gateway.keys import Scope
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway

ROWS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 20


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayUnderTest]:
    with running_gateway(tmp_path) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayUnderTest) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0) as made:
        yield made


def test_the_whole_path(gateway: GatewayUnderTest, client: OpenAI) -> None:
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert (file.bytes, file.purpose, file.status) == (len(ROWS), "fine-tune", "processed")
    assert client.files.content(file.id).read() == ROWS
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="support",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
    )
    assert (job.status, job.seed, job.metadata) == ("queued", 7, {"team": "a"})
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2
    for step in range(1, 46):
        gateway.trainer.add_event(job.id, f"Step {step}", metrics=Progress(step=step, loss=1 / step))
    gateway.trainer.checkpoints[job.id].append(
        Checkpoint(id="ftckpt-1", job_id=job.id, step=45, train_loss=0.5)
    )
    gateway.trainer.succeed(job.id, gateway.adapters.publish("support"))

    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert [event.message for event in events] == [
        "The job has succeeded", *(f"Step {step}" for step in range(45, 0, -1)), "Created",
    ]  # fmt: skip
    assert [checkpoint.step_number for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id)] == [45]
    assert [listed.id for listed in client.fine_tuning.jobs.list()] == [job.id]

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model == f"ft:{BASE}:default:support:v1"
    assert [model.id for model in client.models.list()] == [BASE, "support"]
    assert client.models.retrieve(done.fine_tuned_model).owned_by == "default"

    stream = client.chat.completions.create(
        model=done.fine_tuned_model,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2
    assert gateway.inference.requests[-1].sampling.top_k == 5
    assert client.files.delete(file.id).deleted


def test_completions_and_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt="hi", logprobs=2, echo=True, max_tokens=3)
    assert answer.choices[0].text == "hiHello world"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["h", "i", "Hello", " world"]
    chat = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.message.content for choice in chat.choices] == ["Hello world"] * 2
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [entry.token for entry in chat.choices[0].logprobs.content] == ["Hello", " world"]
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(model=BASE, prompt="a", stream=True)
    )
    assert text == "Hello world"


def test_a_message_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}])
    messages = [
        {"role": "user", "content": "hi"},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "and?"},
    ]
    again = client.chat.completions.create(model=BASE, messages=messages)  # type: ignore[arg-type]
    assert again.choices[0].message.content == "Hello world"


async def test_the_asynchronous_client(gateway: GatewayUnderTest) -> None:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key) as client:
        stream = await client.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == "Hello world"
        answer = await client.completions.create(model=BASE, prompt=["a", "b"])
        assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
        assert [model.id async for model in client.models.list()] == [BASE]


def test_row_102_every_chunk_parses(gateway: GatewayUnderTest, client: OpenAI) -> None:
    texts = ["a\u2028", "\u2029", "\x00", "\r\n", "data: x\n\n", "😀"]
    gateway.inference.scripts["hostile"] = Script(texts=texts)
    stream = client.completions.create(model=BASE, prompt="hostile", stream=True)
    assert [chunk.choices[0].text for chunk in stream][:-1] == texts


def test_errors_are_the_clients_own_classes(gateway: GatewayUnderTest, client: OpenAI) -> None:
    gateway.inference.scripts["full"] = Script(refuse=ResourceExhausted("queue_full", "later"))
    gateway.inference.scripts["away"] = Script(refuse=Unavailable("adapter_unavailable", "later"))
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="unknown", prompt="hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=BASE, prompt="hi", temperature=3)
    assert (bad.value.code, bad.value.param, bad.value.type) == (
        "invalid_value", "temperature", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model=BASE, prompt="full")
    assert full.value.code == "queue_full"
    with pytest.raises(openai.InternalServerError) as away:
        client.completions.create(model=BASE, prompt="away")
    assert (away.value.status_code, away.value.code) == (503, "adapter_unavailable")
    with pytest.raises(openai.AuthenticationError) as unknown:
        client.with_options(api_key="lf-wrong").models.list()
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        client.with_options(api_key=gateway.new_key("default", Scope.FILES)).completions.create(
            model=BASE, prompt="hi"
        )


def test_a_stream_that_fails_raises(gateway: GatewayUnderTest, client: OpenAI) -> None:
    gateway.inference.scripts["failing"] = Script(fail=Unavailable("adapter_unavailable", "it went away"))
    stream = client.completions.create(model=BASE, prompt="failing", stream=True)
    seen: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        seen.extend(chunk.choices[0].text for chunk in stream)
    assert caught.value.code == "adapter_unavailable"


def test_final_errors_are_not_tried_again(gateway: GatewayUnderTest, client: OpenAI) -> None:
    retrying = client.with_options(max_retries=2)
    gateway.inference.scripts["busy"] = Script(
        refuse=ResourceExhausted("queue_full", "later", retry_after_seconds=0.1)
    )
    with pytest.raises(openai.RateLimitError):
        retrying.completions.create(model=BASE, prompt="busy")
    assert len(gateway.inference.requests) == 3
    with pytest.raises(openai.BadRequestError):
        retrying.completions.create(model=BASE, prompt="hi", n=99)
    assert len(gateway.inference.requests) == 3
