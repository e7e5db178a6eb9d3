"""What is refused: bad requests beside a good one, adapters that are not there, or not for this base."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.registry.v1 import adapter_pb2, base_model_pb2
from services.common.base_models import base_model
from services.common.errors import Code, LorafleetError
from services.common.fingerprint import ComputeDtype, Quantization, QuantizationType, fingerprint_base
from tests.support.inference import Fleet, publish, request, running_fleet
from tests.support.models import make_peft_adapter, make_tiny_llama

USER = messages.ChatMessage(role="user", content="x")
BASE = messages.ModelRef(base=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(base, tmp_path_factory.mktemp("adapter") / "one", r=4)


@pytest.fixture
async def fleet(base: Path, adapter: Path, tmp_path: Path, redis_url: str) -> AsyncIterator[Fleet]:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish({"one": adapter})
        yield fleet


def chat(*turns: messages.ChatMessage) -> messages.GenerateRequest:
    return messages.GenerateRequest(model=BASE, chat=messages.ChatPrompt(messages=turns))


def tokens(*token_ids: int) -> messages.GenerateRequest:
    return messages.GenerateRequest(model=BASE, tokens=messages.TokenPrompt(token_ids=token_ids))


# By row of the table of faults: the request, and the reason and field of its refusal.
BAD: dict[str, tuple[messages.GenerateRequest, str, str | None]] = {
    "68 constraint and stop": (request(regex="a+", stop=["b"]), "invalid_value", "sampling.stop"),
    "68 priority": (
        messages.GenerateRequest(model=BASE, text="x", priority=101),
        "invalid_value",
        "priority",
    ),
    "69 unknown": (request(adapter="nobody"), "adapter_not_found", None),
    "69 unknown version": (request(adapter="one:7"), "version_not_found", None),
    "69 unknown alias": (request(adapter="one@prod"), "alias_not_found", None),
    "69 unknown digest": (request(adapter="one@sha256:" + "0" * 64), "version_not_found", None),
    "69 empty": (request(adapter=""), "bad_name", "model.adapter"),
    "69 long": (request(adapter="a" * 10_000), "bad_name", "model.adapter"),
    "69 traversal": (request(adapter="../../etc/passwd"), "bad_name", "model.adapter"),
    "69 no model": (messages.GenerateRequest(text="x"), "invalid_value", "model"),
    "69 not the base": (
        messages.GenerateRequest(model=messages.ModelRef(base=False), text="x"),
        "invalid_value",
        "model",
    ),
    "70 n": (request(n=0), "invalid_value", "sampling.n"),
    "71 temperature": (request(temperature=math.nan), "invalid_value", "sampling.temperature"),
    "72 top_p": (request(top_p=1.1), "invalid_value", "sampling.top_p"),
    "73 max_tokens": (request(max_tokens=0), "invalid_value", "sampling.max_tokens"),
    "74 logprobs": (request(logprobs=21), "invalid_value", "sampling.logprobs"),
    "75 stop": (request(stop=[""]), "invalid_value", "sampling.stop[0]"),
    "76 bias": (request(logit_bias={264: 1.0}), "invalid_value", "sampling.logit_bias"),
    "78 prompt": (request("x" * 513), "context_length_exceeded", "prompt"),
    "78 room": (request("x" * 500, max_tokens=13), "context_length_exceeded", "sampling.max_tokens"),
    "79 no messages": (chat(), "bad_messages", "messages"),
    "79 role": (chat(USER, messages.ChatMessage(role="root")), "bad_messages", "messages[1].role"),
    "79 only system": (
        chat(messages.ChatMessage(role="system", content="x")),
        "bad_messages",
        "messages[0].role",
    ),
    "79 name": (
        chat(messages.ChatMessage(role="user", content="x", name="a b")),
        "bad_messages",
        "messages[0].name",
    ),
    "79 no prompt": (messages.GenerateRequest(model=BASE), "invalid_value", "prompt"),
    "79 empty prompt": (request(""), "invalid_value", "prompt"),
    "79 token outside": (tokens(6, 264), "invalid_value", "tokens.token_ids[1]"),
    "79 no tokens": (tokens(), "invalid_value", "prompt"),
}


async def refusal(fleet: Fleet, bad: messages.GenerateRequest) -> LorafleetError:
    with pytest.raises(LorafleetError) as caught:
        await fleet.client.generate(bad)
    return caught.value


async def test_bad_requests_leave_a_good_stream_alone(fleet: Fleet) -> None:
    good = request("Once", "one", max_tokens=200, ignore_eos=True)
    undisturbed = await fleet.client.generate(good)
    before = await fleet.client.idle()
    running = asyncio.create_task(fleet.client.generate(good))
    refusals = await asyncio.gather(*(refusal(fleet, bad) for bad, _, _ in BAD.values()))
    beside = await running
    assert beside.tokens == undisturbed.tokens
    for row, (error, (_, reason, field)) in enumerate(zip(refusals, BAD.values(), strict=True)):
        name = list(BAD)[row]
        assert error.reason == reason, (name, error)
        assert field is None or error.field == field, (name, error.field)
        assert error.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED), name
    after = await fleet.client.idle()
    assert after.prompt_tokens - before.prompt_tokens == len("Once")


async def test_absent_and_foreign_adapters_look_alike(fleet: Fleet) -> None:
    digest = (await fleet.registry.resolve("one")).digest
    stranger = fleet.as_tenant("stranger")
    for ref in ("one", "one:1", f"one@{digest}", "nobody"):
        with pytest.raises(LorafleetError) as caught:
            await stranger.generate(request(adapter=ref))
        assert caught.value.code is Code.NOT_FOUND
        assert caught.value.reason == "adapter_not_found"
    # Also once the owner has it loaded and its references are known here.
    await fleet.client.generate(request(adapter="one:1"))
    with pytest.raises(LorafleetError) as caught:
        await stranger.generate(request(adapter="one:1"))
    assert caught.value.reason == "adapter_not_found"
    assert (await fleet.client.idle()).prompt_tokens == len("Hello")


async def test_deleted_version_is_refused_and_running_requests_finish(
    base: Path, adapter: Path, tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url, resolve_fresh_seconds=0.0) as fleet:
        await fleet.publish({"one": adapter})
        long = request("Once", "one:1", max_tokens=300, ignore_eos=True)
        undisturbed = await fleet.client.generate(long)
        running = asyncio.create_task(fleet.client.generate(long))
        await fleet.client.until(lambda status: status.running == 1)
        delete = adapter_pb2.DeleteVersionRequest(adapter="one", version=1)
        await fleet.registry.call(fleet.registry.adapters.DeleteVersion, delete)
        error = await refusal(fleet, request(adapter="one:1"))
        assert (error.code, error.reason) == (Code.NOT_FOUND, "adapter_deleted")
        assert (await running).tokens == undisturbed.tokens


async def test_adapters_of_other_base_values_are_refused(fleet: Fleet, base: Path, adapter: Path) -> None:
    other = fingerprint_base(base, Quantization.none(ComputeDtype.FLOAT32))
    assert other.digest == fleet.base_digest
    changed = base_model("other", base, other)
    nf4 = base_model_pb2.Quantization(
        type=base_model_pb2.QUANTIZATION_TYPE_NF4,
        block_size=64,
        double_quantization=True,
        compute_dtype="float32",
    )
    changed.fingerprint.quantization.CopyFrom(nf4)
    changed.fingerprint.digest = nf4_digest(base)
    create = base_model_pb2.CreateBaseModelRequest(base_model=changed)
    await fleet.registry.call(fleet.registry.bases.CreateBaseModel, create)
    await publish(fleet.registry, "four-bit", adapter, changed.fingerprint.digest)
    error = await refusal(fleet, request(adapter="four-bit"))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, "base_revision_mismatch")
    assert (error.value, error.limit) == (repr(changed.fingerprint.digest), fleet.base_digest)
    assert "four-bit:1" not in await fleet.client.residents()


def nf4_digest(base: Path) -> str:
    quantization = Quantization(QuantizationType.NF4, 64, True, ComputeDtype.FLOAT32)
    return fingerprint_base(base, quantization).digest


BAD_SCORES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no completions": ({"text": "x"}, "invalid_value", "completions"),
    "65 completions": ({"text": "x", "completions": ["y"] * 65}, "invalid_value", "completions"),
    "empty completion": ({"text": "x", "completions": ["y", ""]}, "invalid_value", "completions[1]"),
    "empty prompt": ({"text": "", "completions": ["y"]}, "invalid_value", "prompt"),
}


async def test_bad_scores_and_tokens_are_refused(fleet: Fleet) -> None:
    for name, (fields, reason, field) in BAD_SCORES.items():
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.call(fleet.client.stub.Score, calls.ScoreRequest(model=BASE, **fields))
        assert (caught.value.reason, caught.value.field) == (reason, field), name
    for inputs, field in (([], "inputs"), (["x"] * 257, "inputs"), (["x", ""], "inputs[1]")):
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.call(fleet.client.stub.Embed, calls.EmbedRequest(model=BASE, inputs=inputs))
        assert (caught.value.reason, caught.value.field) == ("invalid_value", field)
    with pytest.raises(LorafleetError) as caught:
        await fleet.client.call(fleet.client.stub.Embed, calls.EmbedRequest(model=BASE, inputs=["x" * 513]))
    assert caught.value.reason == "context_length_exceeded"
    with pytest.raises(LorafleetError) as caught:
        await fleet.client.call(fleet.client.stub.Detokenize, calls.DetokenizeRequest(token_ids=[2**32 - 1]))
    assert (caught.value.reason, caught.value.field) == ("invalid_value", "token_ids")
    with pytest.raises(LorafleetError) as caught:
        await fleet.client.call(fleet.client.stub.Tokenize, calls.TokenizeRequest())
    assert caught.value.reason == "invalid_value"
    for interval_seconds in (0.0, 61.0, math.nan):
        with pytest.raises(LorafleetError) as caught:
            await first_status(fleet, interval_seconds)
        assert (caught.value.reason, caught.value.field) == ("invalid_value", "interval_seconds")


async def first_status(fleet: Fleet, interval_seconds: float) -> calls.EngineStatus:
    async def first(message: calls.WatchStatusRequest, *, timeout: float) -> calls.EngineStatus:
        async for status in fleet.client.stub.WatchStatus(message, timeout=timeout):
            return status
        raise AssertionError("the stream is empty")

    result: calls.EngineStatus = await fleet.client.call(
        first, calls.WatchStatusRequest(interval_seconds=interval_seconds)
    )
    return result
