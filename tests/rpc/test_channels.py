"""Our channels against real servers: what they carry along, deadlines, retries, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.common.call_context import call_scope, remaining_seconds
from services.common.channels import RetryPolicy, open_channel
from services.common.config import ServiceSettings
from services.common.errors import Unavailable
from services.common.status import from_rpc_error
from tests.support.rpc import (
    CHAT,
    COLLECT,
    ONCE,
    SERVICE,
    STREAM,
    TENANT,
    echo_service,
    our_channel,
    running_host,
)

CARRIED = ("lorafleet-tenant", "x-request-id")


def facts(context: Any) -> bytes:
    """Return what arrived: tenant, request id, and the timeout rounded to seconds."""
    metadata = dict(context.invocation_metadata())
    left = context.time_remaining()
    return " ".join([*(metadata[key] for key in CARRIED), str(left and round(left))]).encode()


async def tell_once(request: Any, context: Any) -> bytes:
    return facts(context)


async def tell_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
    yield facts(context)


async def one(message: bytes) -> AsyncIterator[bytes]:
    yield message


async def test_every_kind_carries_tenant_request_id_and_the_time_left() -> None:
    handlers = echo_service(once=tell_once, stream=tell_stream, collect=tell_once, chat=tell_stream)
    async with our_channel(handlers) as channel:
        with call_scope(request_id="r-1", tenant="acme", timeout_seconds=9.9):
            assert await channel.unary_unary(ONCE)(b"") == b"acme r-1 10"
            assert await channel.stream_unary(COLLECT)(one(b"")) == b"acme r-1 10"
            assert [m async for m in channel.unary_stream(STREAM)(b"")] == [b"acme r-1 10"]
            assert [m async for m in channel.stream_stream(CHAT)(one(b""))] == [b"acme r-1 10"]
            assert await channel.unary_unary(ONCE)(b"", timeout=3) == b"acme r-1 3"
            assert await channel.unary_unary(ONCE)(b"", timeout=600) == b"acme r-1 10"
            other = (("lorafleet-tenant", "other"),)
            assert await channel.unary_unary(ONCE)(b"", metadata=other) == b"other r-1 10"
        with call_scope(request_id="r-2", tenant="acme"):
            assert await channel.unary_unary(ONCE)(b"") == b"acme r-2 60"
            assert [m async for m in channel.unary_stream(STREAM)(b"")] == [b"acme r-2 None"]


async def test_a_call_chain_shares_one_deadline() -> None:
    seen: list[float | None] = []

    async def inner_once(request: bytes, context: Any) -> bytes:
        seen.append(remaining_seconds())
        await asyncio.sleep(30)
        return b""

    async with our_channel(echo_service(once=inner_once)) as inner:

        async def outer_once(request: bytes, context: Any) -> Any:
            return await inner.unary_unary(ONCE)(request, timeout=600)

        async with our_channel(echo_service(once=outer_once)) as outer:
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await outer.unary_unary(ONCE)(b"", metadata=TENANT, timeout=0.5)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert seen[0] is not None
    assert seen[0] <= 0.5


async def test_no_time_left_means_no_call() -> None:
    ran = False

    async def note(request: bytes, context: Any) -> bytes:
        nonlocal ran
        ran = True
        return b""

    async with our_channel(echo_service(once=note, stream=note)) as channel:
        with call_scope(tenant="acme", timeout_seconds=0):
            for call in (channel.unary_unary(ONCE)(b""), channel.unary_stream(STREAM)(b"").read()):
                with pytest.raises(grpc.aio.AioRpcError) as late:
                    await call
                assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not ran


@pytest.mark.parametrize(("idempotent", "attempts"), [([f"{SERVICE}/Once"], 3), ([], 1)])
async def test_only_idempotent_methods_are_retried(idempotent: list[str], attempts: int) -> None:
    calls = 0

    async def fail_twice(request: bytes, context: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise Unavailable("store_unavailable", "not yet")
        return b"done"

    retry = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.02)
    async with our_channel(
        echo_service(once=fail_twice), idempotent_methods=idempotent, retry=retry
    ) as channel:
        call = channel.unary_unary(ONCE)(b"", metadata=TENANT)
        if attempts == 3:
            assert await call == b"done"
        else:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call
            assert from_rpc_error(failed.value).reason == "store_unavailable"
    assert calls == attempts


async def test_a_stream_is_not_retried_once_it_has_begun() -> None:
    calls = 0

    async def break_off(request: bytes, context: Any) -> AsyncIterator[bytes]:
        nonlocal calls
        calls += 1
        yield b"first"
        raise Unavailable("gone", "gone")

    async with our_channel(
        echo_service(stream=break_off), idempotent_methods=[f"{SERVICE}/Stream"]
    ) as channel:
        call = channel.unary_stream(STREAM)(b"", metadata=TENANT)
        assert await call.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
    assert from_rpc_error(failed.value).reason == "gone"
    assert calls == 1


async def test_a_cancelled_stream_reaches_the_server() -> None:
    closed = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async with our_channel(echo_service(stream=endless)) as channel:
        call = channel.unary_stream(STREAM)(b"", metadata=TENANT)
        assert await call.read() == b"x"
        assert call.cancel()
        async with asyncio.timeout(5):
            await closed.wait()
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_a_channel_finds_its_server_again_after_a_restart() -> None:
    async def once(request: bytes, context: Any) -> bytes:
        return b"here"

    async with running_host(echo_service(once=once)) as (_, address):
        channel: Any = open_channel(address, idempotent_methods=[f"{SERVICE}/Once"])
        assert await channel.unary_unary(ONCE)(b"", metadata=TENANT) == b"here"
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await channel.unary_unary(ONCE)(b"", metadata=TENANT, timeout=2)
        assert gone.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        async with running_host(echo_service(once=once), ServiceSettings(listen=address)):
            call = channel.unary_unary(ONCE)(b"", metadata=TENANT, timeout=10, wait_for_ready=True)
            assert await call == b"here"
