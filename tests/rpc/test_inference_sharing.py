"""What many callers share: prefixes within a tenant, places in the queue, and time; over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorafleet.inference.v1 import generation_pb2 as messages
from services.common.call_context import call_scope
from services.common.errors import DeadlineExceeded, LorafleetError, ResourceExhausted
from services.common.status import from_rpc_error
from tests.support.inference import Fleet, InferenceClient, request, running_fleet
from tests.support.models import make_peft_adapter, make_tiny_llama

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
PROMPT = "The same beginning, again and again: "


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture
async def fleet(base: Path, tmp_path: Path, redis_url: str) -> AsyncIterator[Fleet]:
    async with running_fleet(base, tmp_path, redis_url, max_queued_requests=8, max_num_seqs=2) as fleet:
        yield fleet


def usage(client_answer: Any) -> messages.Usage:
    """Return the usage that ended the only completion."""
    finished = client_answer.only.finished
    assert isinstance(finished, messages.Finished)
    return finished.usage


async def test_106_a_prefix_is_found_by_its_tenant_and_version_only(
    fleet: Fleet, base: Path, tmp_path: Path
) -> None:
    old = make_peft_adapter(base, tmp_path / "old", r=4, seed=1)
    new = make_peft_adapter(base, tmp_path / "new", r=4, seed=2)
    await fleet.publish({"a": old})
    client, other = fleet.client, fleet.as_tenant("other")
    first = await client.generate(request(PROMPT, "a"))
    again = await client.generate(request(PROMPT, "a"))
    prompt_tokens = usage(first).prompt_tokens
    assert usage(first).cached_tokens == 0
    assert usage(again).cached_tokens == (prompt_tokens - 1) // 4 * 4 > 0
    assert again.tokens == first.tokens
    for stranger in (await other.generate(request(PROMPT)), await client.generate(request(PROMPT))):
        assert usage(stranger).cached_tokens == 0
    await fleet.publish({"a": new})
    renewed = await client.generate(request(PROMPT, "a:2"))
    assert usage(renewed).cached_tokens == 0
    assert renewed.tokens != first.tokens
    assert (await client.generate(request(PROMPT, "a:1"))).tokens == first.tokens


async def test_a_flood_leaves_places_and_turns_to_others(fleet: Fleet) -> None:
    flood = [asyncio.create_task(fleet.client.generate(request("x", **LONG))) for _ in range(4)]
    await fleet.client.until(lambda status: status.running + status.queued == 4)
    with pytest.raises(ResourceExhausted) as caught:
        await fleet.client.generate(request("x"))
    assert (caught.value.reason, caught.value.limit) == ("queue_full", "4")
    assert caught.value.retry_after_seconds is not None
    quiet = await fleet.as_tenant("quiet").generate(request("x"))
    assert len(quiet.tokens) > 0
    assert not any(task.done() for task in flood)
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    await fleet.client.idle()


async def test_a_priority_is_taken(fleet: Fleet) -> None:
    order: list[int] = []

    async def ask(priority: int) -> None:
        message = request("x", max_tokens=40, ignore_eos=True)
        message.priority = priority
        await fleet.client.generate(message)
        order.append(priority)

    running = [asyncio.create_task(ask(0)) for _ in range(2)]
    await fleet.client.until(lambda status: status.running == 2)
    low = asyncio.create_task(ask(-100))
    await fleet.client.until(lambda status: status.queued == 1)
    high = asyncio.create_task(ask(100))
    await asyncio.gather(low, high, *running)
    assert order.index(100) < order.index(-100)


async def generate_within(client: InferenceClient, timeout_seconds: float) -> LorafleetError | None:
    """Ask for a long answer in too little time; return what became of it."""
    try:
        with call_scope(tenant=client.tenant):
            async for _ in client.stub.Generate(request(PROMPT, **LONG), timeout=timeout_seconds):
                pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None


async def test_110_a_deadline_of_a_millisecond_starts_no_work(fleet: Fleet) -> None:
    before = await fleet.client.status()
    assert isinstance(await generate_within(fleet.client, 0.0), DeadlineExceeded)
    after = await fleet.client.idle()
    assert after.steps == before.steps
    # What is scheduled within its millisecond has its first step, and no second one.
    for _ in range(8):
        assert isinstance(await generate_within(fleet.client, 0.001), DeadlineExceeded)
    after = await fleet.client.idle()
    assert after.steps - before.steps <= 2
    assert after.generated_tokens - before.generated_tokens <= 2
