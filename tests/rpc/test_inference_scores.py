"""Scores and embeddings equal those of transformers and PEFT, and the status is streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from services.common.call_context import call_scope
from services.common.prompts import PromptEncoder
from tests.support.inference import Fleet, request, running_fleet
from tests.support.models import ALL_LINEAR_TARGETS, load_peft_adapters, make_peft_adapter, make_tiny_llama

COMPLETIONS = [" is a fleet", "x", "éé🚢", " of many words, and of so many that a chunk does not hold it"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "one"
    return make_peft_adapter(base, folder, r=8, targets=ALL_LINEAR_TARGETS)


@pytest.fixture
async def fleet(base: Path, adapter: Path, tmp_path: Path, redis_url: str) -> AsyncIterator[Fleet]:
    # Few tokens a step and few blocks: prompts come in chunks, and sequences make way for others.
    async with running_fleet(
        base, tmp_path, redis_url, max_batch_tokens=24, max_num_seqs=8, kv_bytes=256 << 10
    ) as fleet:
        await fleet.publish({"one": adapter})
        yield fleet


def reference(base: Path, adapter: Path | None) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True
    )
    if adapter is not None:
        load_peft_adapters(model, {"one": adapter})
    return model.eval()


@pytest.mark.parametrize("name", [None, "one"])
async def test_scores_equal_those_of_transformers(
    fleet: Fleet, base: Path, adapter: Path, name: str | None
) -> None:
    model, encoder = reference(base, adapter if name else None), PromptEncoder.load(base)
    ref = messages.ModelRef(adapter=name) if name else messages.ModelRef(base=True)
    scored = await fleet.client.call(
        fleet.client.stub.Score, calls.ScoreRequest(model=ref, text="Lorafleet", completions=COMPLETIONS)
    )
    prompt = encoder.encode_text("Lorafleet")
    for completion, score in zip(COMPLETIONS, scored.scores, strict=True):
        ids = encoder.encode_completion(completion)
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert [token.token_id for token in score.tokens] == ids
        assert [token.logprob for token in score.tokens] == pytest.approx(expected.tolist(), abs=1e-4)
        assert score.logprob == pytest.approx(expected.sum().item(), abs=1e-3)
        assert score.is_greedy == (logits.argmax(-1).tolist() == ids)
    many = calls.ScoreRequest(model=ref, text="Lorafleet", completions=[*COMPLETIONS] * 16)
    again = await fleet.client.call(fleet.client.stub.Score, many)
    assert [score.logprob for score in again.scores] == pytest.approx(
        [score.logprob for score in scored.scores] * 16, abs=1e-4
    )
    await fleet.client.idle()


@pytest.mark.parametrize("name", [None, "one"])
async def test_embeddings_are_means_of_last_hidden_states(
    fleet: Fleet, base: Path, adapter: Path, name: str | None
) -> None:
    model, encoder = reference(base, adapter if name else None), PromptEncoder.load(base)
    ref = messages.ModelRef(adapter=name) if name else messages.ModelRef(base=True)
    inputs = ["a", "Lorafleet " * 7, "é" * 40, "the same", "the same"]
    running = asyncio.create_task(fleet.client.generate(request("Once", max_tokens=30, ignore_eos=True)))
    answer = await fleet.client.call(fleet.client.stub.Embed, calls.EmbedRequest(model=ref, inputs=inputs))
    beside = await running
    assert (
        beside.tokens == (await fleet.client.generate(request("Once", max_tokens=30, ignore_eos=True))).tokens
    )
    for text, embedding in zip(inputs, answer.embeddings, strict=True):
        with torch.no_grad():
            output = model.get_decoder()(torch.tensor([encoder.encode_text(text)]))
        expected = output.last_hidden_state[0].mean(0)
        assert list(embedding.values) == pytest.approx(expected.tolist(), abs=1e-4)
    assert answer.usage.prompt_tokens == sum(len(encoder.encode_text(text)) for text in inputs)
    assert bool(answer.version_digest) == (name is not None)
    # A text whose beginning is in the prefix cache is embedded as a whole all the same.
    again = await fleet.client.call(fleet.client.stub.Embed, calls.EmbedRequest(model=ref, inputs=inputs))
    for first, second in zip(answer.embeddings, again.embeddings, strict=True):
        assert list(second.values) == pytest.approx(list(first.values), abs=1e-5)
    await fleet.client.idle()


async def test_the_status_is_streamed_while_work_goes_on(fleet: Fleet) -> None:
    with call_scope(tenant="acme"):
        watch = fleet.client.stub.WatchStatus(calls.WatchStatusRequest(interval_seconds=0.1), timeout=30)
        generation = asyncio.create_task(
            fleet.client.generate(request("Once", "one", max_tokens=60, ignore_eos=True))
        )
        started, seen = time.monotonic(), []
        async for status in watch:
            seen.append(status)
            if generation.done() and status.running == 0:
                break
        watch.cancel()
    await generation
    assert len(seen) >= 2
    assert len(seen) <= 2 + (time.monotonic() - started) / 0.1
    assert seen[-1].generated_tokens == 60
    assert [status.steps for status in seen] == sorted(status.steps for status in seen)
    assert seen[-1].free_kv_blocks == seen[-1].total_kv_blocks
