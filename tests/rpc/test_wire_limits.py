"""What a server takes from the wire: sizes, metadata, streams and pings, and bytes that are no request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from lorafleet.registry.v1.adapter_pb2 import PublishVersionRequest, ResolveVersionRequest
from services.common.channels import open_channel
from services.common.errors import LorafleetError
from services.common.status import from_rpc_error
from services.common.transport import (
    MAX_CONCURRENT_STREAMS,
    MESSAGE_HARD_LIMIT_BYTES,
    MESSAGE_LIMIT_BYTES,
)
from tests.support.http2 import Connection, Frame, headers
from tests.support.rpc import (
    COLLECT,
    ONCE,
    SERVICE,
    STREAM,
    TENANT,
    echo_service,
    foreign_channel,
    plain_channel,
    running_host,
)

ENHANCE_YOUR_CALM = 11


async def length(request: bytes, context: Any) -> bytes:
    return str(len(request)).encode()


async def lengths(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b"+".join([str(len(request)).encode() async for request in requests])


async def once(request: bytes, context: Any) -> bytes:
    return b"here"


async def messages(*sizes_bytes: int) -> AsyncIterator[bytes]:
    for size_bytes in sizes_bytes:
        yield bytes(size_bytes)


async def failure(call: Any) -> LorafleetError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return from_rpc_error(refused.value)


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_row_112_a_message_above_the_limit_is_refused_by_name_and_the_connection_survives(
    kind: str,
) -> None:
    async with running_host(echo_service(once=length, collect=lengths)) as (_, address):
        channel: Any = open_channel(address)
        async with channel:
            for size_bytes, reason in (
                (MESSAGE_LIMIT_BYTES + 1, "message_too_large"),
                (MESSAGE_HARD_LIMIT_BYTES, "message_too_large"),
                # Above the hard limit gRPC stops reading, and there is nobody left to name the reason.
                (MESSAGE_HARD_LIMIT_BYTES + 1, "resource_exhausted"),
            ):
                if kind == "unary":
                    call = channel.unary_unary(ONCE)(bytes(size_bytes), metadata=TENANT)
                else:
                    call = channel.stream_unary(COLLECT)(messages(1, size_bytes, 1), metadata=TENANT)
                error = await failure(call)
                assert (error.code.value, error.reason) == ("RESOURCE_EXHAUSTED", reason)
                if reason == "message_too_large":
                    assert (error.value, error.limit) == (str(size_bytes), str(MESSAGE_LIMIT_BYTES))
                    assert error.final
            full = MESSAGE_LIMIT_BYTES
            assert await channel.unary_unary(ONCE)(bytes(full), metadata=TENANT) == str(full).encode()
            assert await channel.stream_unary(COLLECT)(messages(1, 2), metadata=TENANT) == b"1+2"


@pytest.mark.parametrize(
    ("metadata", "is_taken"),
    [
        ((("x-big", "x" * 10_000),), True),
        ((("x-big", "x" * 20_000),), False),
        ((("x-big", "x" * 1_000_000),), False),
        ((("x-big-bin", bytes(range(256)) * 30),), True),
        ((("x-big-bin", bytes(20_000)),), False),
        (tuple((f"x-{n}", "x" * 100) for n in range(200)), False),
    ],
    ids=["113 10 KB", "113 20 KB", "113 1 MB", "113 binary", "113 binary 20 KB", "113 many"],
)
async def test_row_113_metadata_has_one_fixed_limit(
    metadata: tuple[tuple[str, str | bytes], ...], is_taken: bool
) -> None:
    async with plain_channel(echo_service(once=once)) as channel:
        # Several times: between a soft and a hard limit some calls would pass and some would not.
        for _ in range(5):
            call = channel.unary_unary(ONCE)(b"", metadata=(*TENANT, *metadata), timeout=10)
            if is_taken:
                assert await call == b"here"
            else:
                assert (await failure(call)).code.value == "RESOURCE_EXHAUSTED"
        assert await channel.unary_unary(ONCE)(b"", metadata=TENANT) == b"here"


async def test_row_113_reserved_metadata_changes_nothing() -> None:
    async with running_host(echo_service(once=once)) as (_, address):
        async with Connection.open(address) as connection:
            forged = [("grpc-status", "0"), ("grpc-message", "x"), ("grpc-status-details-bin", "AAAA")]
            await connection.send(headers(1, ONCE, [*TENANT, *forged]), b"\0\0\0\0\0")
            assert await connection.ends(1)
        async with foreign_channel(address) as channel:
            assert await channel.unary_unary(ONCE)(b"", metadata=TENANT) == b"here"


@pytest.mark.parametrize(
    "method",
    [
        f"/{SERVICE}/Absent",
        "/lorafleet.test.v2.EchoService/Once",
        "/EchoService/Once",
        "/",
        "/../Once",
        f"/{SERVICE}/once",
    ],
)
async def test_row_114_an_unknown_method_is_unimplemented(method: str) -> None:
    async with plain_channel(echo_service(once=once)) as channel:
        error = await failure(channel.unary_unary(method)(b"", metadata=TENANT))
    assert error.code.value == "UNIMPLEMENTED"


def typed_service() -> grpc.GenericRpcHandler:
    """A service whose methods take messages of the registry."""

    async def resolve(request: Any, context: Any) -> bytes:
        return str(request.ref).encode()

    async def resolve_stream(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield str(request.ref).encode()

    async def publish(requests: Any, context: Any) -> bytes:
        return b"+".join([str(request.header.adapter).encode() async for request in requests])

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Once": grpc.unary_unary_rpc_method_handler(resolve, ResolveVersionRequest.FromString),
            "Stream": grpc.unary_stream_rpc_method_handler(resolve_stream, ResolveVersionRequest.FromString),
            "Collect": grpc.stream_unary_rpc_method_handler(publish, PublishVersionRequest.FromString),
        },
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\x0a\x05abc",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x02\xff\xfe",
        b"\x0b" * 200,
    ],
    ids=["114 tag", "114 cut short", "114 length", "114 not UTF-8", "114 groups"],
)
async def test_row_114_bytes_that_are_no_request(data: bytes) -> None:
    async def one(message: bytes) -> AsyncIterator[bytes]:
        yield message

    async with plain_channel(typed_service()) as channel:
        for call in (
            channel.unary_unary(ONCE)(data, metadata=TENANT),
            channel.unary_stream(STREAM)(data, metadata=TENANT).read(),
            channel.stream_unary(COLLECT)(one(data), metadata=TENANT),
        ):
            error = await failure(call)
            assert (error.code.value, error.reason) == ("INVALID_ARGUMENT", "malformed_message")
        request = ResolveVersionRequest(ref="billing").SerializeToString()
        assert await channel.unary_unary(ONCE)(request, metadata=TENANT) == b"billing"


async def test_row_115_one_connection_never_runs_more_calls_than_its_limit() -> None:
    under_way = most = 0
    full, go_on = asyncio.Event(), asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        nonlocal under_way, most
        if request == b"first":
            return b""
        under_way += 1
        most = max(most, under_way)
        if under_way == MAX_CONCURRENT_STREAMS:
            full.set()
        await go_on.wait()
        under_way -= 1
        return b""

    async with running_host(echo_service(once=wait)) as (_, address), foreign_channel(address) as channel:
        method = channel.unary_unary(ONCE)
        # The client learns of the limit when it connects.
        await method(b"first", metadata=TENANT)
        calls = [method(b"", metadata=TENANT, timeout=60) for _ in range(MAX_CONCURRENT_STREAMS + 50)]
        async with asyncio.timeout(60):
            await full.wait()
        await asyncio.sleep(0.3)
        assert under_way == MAX_CONCURRENT_STREAMS
        go_on.set()
        ends = await asyncio.gather(*calls, return_exceptions=True)
    # Of those that waited, some come before the server has cleared a place, and are refused.
    assert ends.count(b"") >= MAX_CONCURRENT_STREAMS
    assert all(end == b"" or isinstance(end, grpc.aio.AioRpcError) for end in ends)
    assert most == MAX_CONCURRENT_STREAMS


async def test_row_115_a_ping_flood_ends_the_connection() -> None:
    async with running_host(echo_service(once=once)) as (_, address):
        async with Connection.open(address) as connection:
            assert await connection.ping_until_goaway(100) == ENHANCE_YOUR_CALM
        async with foreign_channel(address) as channel:
            assert await channel.unary_unary(ONCE)(b"", metadata=TENANT) == b"here"


async def test_row_115_a_client_that_opens_and_resets_slows_no_other_down() -> None:
    async def p99_seconds(method: Any, count: int = 100) -> float:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            assert await method(b"", metadata=TENANT, timeout=10) == b"here"
            times.append(time.perf_counter() - started)
        return sorted(times)[count * 99 // 100]

    async def flood(connection: Connection) -> None:
        for number in range(5000):
            stream = 2 * number + 1
            await connection.send(headers(stream, ONCE, TENANT))
            await connection.send(Frame.reset(stream))
            if number % 50 == 0:
                await asyncio.sleep(0)

    async with (
        running_host(echo_service(once=once)) as (_, address),
        foreign_channel(address) as channel,
        Connection.open(address) as connection,
    ):
        method = channel.unary_unary(ONCE)
        await p99_seconds(method)
        flooding = asyncio.create_task(flood(connection))
        slowest = await p99_seconds(method)
        await asyncio.gather(flooding, return_exceptions=True)
        assert slowest < 1.0
        assert await method(b"", metadata=TENANT) == b"here"
