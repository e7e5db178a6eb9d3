"""Peers that vanish, answer late or only fail: keepalive, deadlines, throttled retries, clocks that jump."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorafleet.registry.v1 import base_model_pb2
from services.common import call_context, transport
from services.common.channels import RetryPolicy, open_channel
from services.common.config import ServiceSettings
from services.common.errors import Unavailable
from services.common.server import ServiceHost
from services.common.transport import KEEPALIVE, MIN_PING_INTERVAL_SECONDS, KeepAlive
from services.registry.service import SERVICES, Registry
from tests.support.registry import Client, Place, Upload, base_message
from tests.support.rpc import ONCE, SERVICE, STREAM, TENANT, echo_service, our_channel
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

HOUR = 3600.0
QUICK = KeepAlive(interval_seconds=1.0, timeout_seconds=0.5)


def test_row_116_a_vanished_peer_is_found_within_thirty_seconds() -> None:
    assert KEEPALIVE.interval_seconds + KEEPALIVE.timeout_seconds <= 30


async def test_row_116_keepalive_ends_a_long_stream_on_both_sides() -> None:
    ended = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.sleep(60)
        finally:
            ended.set()

    host = ServiceHost(ServiceSettings(), [SERVICE], keepalive=QUICK)
    host.server.add_generic_rpc_handlers((echo_service(stream=endless),))
    address = str(await host.start())
    try:
        async with tcp_proxy(address) as proxy:
            channel: Any = open_channel(proxy.address, keepalive=QUICK)
            async with channel:
                call = channel.unary_stream(STREAM)(b"", metadata=TENANT)
                assert await call.read() == b"first"
                proxy.cut()
                async with asyncio.timeout(20):
                    with pytest.raises(grpc.aio.AioRpcError) as gone:
                        await call.read()
                async with asyncio.timeout(20):
                    await ended.wait()
        assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await host.stop(grace_seconds=0)


@pytest.mark.parametrize("pinging", ["server", "client"])
async def test_row_116_a_quiet_stream_with_a_live_peer_is_left_alone(
    pinging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.sleep(5)
        yield b"second"

    # How often a client may ping, shortened as the interval itself is.
    shortening = QUICK.interval_seconds / KEEPALIVE.interval_seconds
    monkeypatch.setattr(transport, "MIN_PING_INTERVAL_SECONDS", MIN_PING_INTERVAL_SECONDS * shortening)
    host = ServiceHost(ServiceSettings(), [SERVICE], keepalive=QUICK if pinging == "server" else KEEPALIVE)
    host.server.add_generic_rpc_handlers((echo_service(stream=slow),))
    address = str(await host.start())
    try:
        channel: Any = open_channel(address, keepalive=QUICK if pinging == "client" else KEEPALIVE)
        async with channel:
            call = channel.unary_stream(STREAM)(b"", metadata=TENANT)
            assert [message async for message in call] == [b"first", b"second"]
    finally:
        await host.stop(grace_seconds=0)


@pytest.mark.parametrize("timeout_seconds", [-1.0, 0.001], ids=["110 past", "110 1 ms"])
async def test_row_110_a_deadline_that_has_passed_starts_no_work(timeout_seconds: float) -> None:
    steps = 0

    async def work(request: bytes, context: Any) -> bytes:
        nonlocal steps
        # A call that came in time may have begun; its first wait is its last.
        await asyncio.sleep(0.05)
        steps += 1
        return b""

    async with our_channel(echo_service(once=work)) as channel:
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await channel.unary_unary(ONCE)(b"", metadata=TENANT, timeout=timeout_seconds)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.sleep(0.3)
    assert steps == 0


async def test_row_111_a_write_whose_answer_came_too_late_is_given_back_by_its_key(
    redis_url: str, tmp_path: Path
) -> None:
    place = Place.in_directory(redis_url, tmp_path / "objects")
    settings = place.settings()
    host = ServiceHost(settings, SERVICES)
    registry = Registry(settings)
    await registry.register(host)
    await registry.probe()
    address = str(await host.start())
    try:
        async with tcp_proxy(address) as proxy:
            await publish_unheard(address, proxy, Upload.made(0))
    finally:
        await host.stop(grace_seconds=0)


async def publish_unheard(address: str, proxy: TcpProxy, upload: Upload) -> None:
    async with open_channel(address) as near, open_channel(proxy.address) as far:
        direct, cut_off = Client(near, "acme"), Client(far, "acme")
        request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
        await cut_off.call(cut_off.bases.CreateBaseModel, request)
        proxy.to_client.clear()
        with call_context.call_scope(tenant="acme"), pytest.raises(grpc.aio.AioRpcError) as late:
            await cut_off.adapters.PublishVersion(upload.requests(upload.header(key="job-1")), timeout=3)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        committed = await direct.resolve("billing")
        again = await direct.publish(upload, key="job-1")
        assert again == committed
        assert again.version == 1


async def test_row_120_retries_of_a_dead_back_end_stay_below_a_tenth() -> None:
    attempts = 0

    async def fail(request: bytes, context: Any) -> bytes:
        nonlocal attempts
        attempts += 1
        raise Unavailable("store_unavailable", "no")

    calls = 300
    retry = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.02)
    async with our_channel(
        echo_service(once=fail), idempotent_methods=[f"{SERVICE}/Once"], retry=retry
    ) as channel:
        method = channel.unary_unary(ONCE)
        for _ in range(10):
            burst = [method(b"", metadata=TENANT, timeout=10) for _ in range(calls // 10)]
            ends = await asyncio.gather(*burst, return_exceptions=True)
            assert all(isinstance(end, grpc.aio.AioRpcError) for end in ends)
    assert calls < attempts <= 1.1 * calls


async def test_row_120_retries_come_back_with_success() -> None:
    failing = True
    attempts = 0

    async def maybe(request: bytes, context: Any) -> bytes:
        nonlocal attempts
        attempts += 1
        if failing or (request == b"once" and attempts == 1):
            raise Unavailable("store_unavailable", "no")
        return b"here"

    retry = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.02)
    async with our_channel(
        echo_service(once=maybe), idempotent_methods=[f"{SERVICE}/Once"], retry=retry
    ) as channel:
        method = channel.unary_unary(ONCE)
        for _ in range(40):
            with pytest.raises(grpc.aio.AioRpcError):
                await method(b"", metadata=TENANT, timeout=10)
        failing = False
        for _ in range(100):
            assert await method(b"", metadata=TENANT, timeout=10) == b"here"
        attempts = 0
        assert await method(b"once", metadata=TENANT, timeout=10) == b"here"
    assert attempts == 2


@pytest.mark.parametrize("jump_seconds", [HOUR, -HOUR], ids=["136 forward", "136 back"])
async def test_row_136_a_clock_that_jumps_moves_no_deadline(
    jump_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float | None] = []
    true_time = time.time

    async def work(request: bytes, context: Any) -> bytes:
        monkeypatch.setattr(time, "time", lambda: true_time() + jump_seconds)
        await asyncio.sleep(0.1)
        left.append(call_context.remaining_seconds())
        if request == b"slow":
            await asyncio.sleep(30)
        return b"here"

    async with our_channel(echo_service(once=work)) as channel:
        method = channel.unary_unary(ONCE)
        assert await method(b"", metadata=TENANT, timeout=3) == b"here"
        monkeypatch.undo()
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await method(b"slow", metadata=TENANT, timeout=0.5)
        assert 0.3 < time.monotonic() - started < 5
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert left[0] is not None
    assert 0 < left[0] <= 3
