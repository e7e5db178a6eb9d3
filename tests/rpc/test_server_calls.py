"""The interceptor on a real server, for all four kinds: errors, deadlines, cancels, tenant, request id."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.common import call_context
from services.common.config import ServiceSettings
from services.common.errors import FieldViolation, InvalidArgument, LorafleetError, NotFound
from services.common.logs import JsonFormatter
from services.common.status import from_rpc_error, is_ours
from tests.support.rpc import (
    CHAT,
    COLLECT,
    ONCE,
    STREAM,
    TENANT,
    echo_service,
    foreign_channel,
    plain_channel,
)


async def once(request: bytes, context: Any) -> bytes:
    return request.upper()


async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for letter in request:
        yield bytes([letter])


async def written(request: bytes, context: Any) -> None:
    for letter in request:
        await context.write(bytes([letter]))


async def collect(requests: AsyncIterator[bytes], context: Any) -> bytes:
    return b"+".join([request async for request in requests])


async def chat(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request.upper()


async def sent(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def failure(call: Any) -> LorafleetError:
    """Return the error that a call ends with, as our clients see it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drain(call) if hasattr(call, "read") else call)
    return from_rpc_error(caught.value)


async def ended_calls(caplog: pytest.LogCaptureFixture, count: int) -> None:
    """Wait until the access log has `count` lines; the server ends a call after its client has."""
    for _ in range(500):
        if sum(record.name == "lorafleet.access" for record in caplog.records) >= count:
            break
        await asyncio.sleep(0.01)


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_all_four_kinds_answer() -> None:
    async with plain_channel(echo_service(once=once, stream=stream, collect=collect, chat=chat)) as channel:
        assert await channel.unary_unary(ONCE)(b"abc", metadata=TENANT) == b"ABC"
        assert [m async for m in channel.unary_stream(STREAM)(b"abc", metadata=TENANT)] == [b"a", b"b", b"c"]
        assert await channel.stream_unary(COLLECT)(sent(b"a", b"b"), metadata=TENANT) == b"a+b"
        answers = channel.stream_stream(CHAT)(sent(b"x", b"y"), metadata=TENANT)
        assert [m async for m in answers] == [b"X", b"Y"]


async def test_a_coroutine_that_writes_streams_too() -> None:
    async with plain_channel(echo_service(stream=written)) as channel:
        assert [m async for m in channel.unary_stream(STREAM)(b"ab", metadata=TENANT)] == [b"a", b"b"]


def rich_error() -> InvalidArgument:
    return InvalidArgument(
        "rank_too_large",
        "rank 512 is above 64",
        field="lora.rank",
        value=512,
        limit=64,
        violations=[FieldViolation("lora.rank", "above 64", "rank_too_large")],
        metadata={"adapter": "billing"},
    )


def check_rich_error(error: LorafleetError) -> None:
    assert isinstance(error, InvalidArgument)
    assert (error.reason, error.message) == ("rank_too_large", "rank 512 is above 64")
    assert (error.field, error.value, error.limit) == ("lora.rank", "512", "64")
    assert error.violations == (FieldViolation("lora.rank", "above 64", "rank_too_large"),)
    assert error.metadata == {"adapter": "billing"}


async def test_an_error_keeps_its_details_in_every_kind() -> None:
    async def fail(request: Any, context: Any) -> bytes:
        raise rich_error()

    async def fail_after_one(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        raise rich_error()

    async def fail_after_write(request: Any, context: Any) -> None:
        await context.write(b"first")
        raise rich_error()

    handlers = echo_service(once=fail, stream=fail_after_one, collect=fail, chat=fail_after_write)
    async with plain_channel(handlers) as channel:
        check_rich_error(await failure(channel.unary_unary(ONCE)(b"", metadata=TENANT)))
        check_rich_error(await failure(channel.stream_unary(COLLECT)(sent(b"a"), metadata=TENANT)))
        for call in (
            channel.unary_stream(STREAM)(b"", metadata=TENANT),
            channel.stream_stream(CHAT)(sent(b"a"), metadata=TENANT),
        ):
            assert await call.read() == b"first"
            check_rich_error(await failure(call))


async def test_an_unexpected_error_shows_an_id_and_logs_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        raise KeyError("secret detail")

    async with plain_channel(echo_service(once=fail)) as channel:
        error = await failure(channel.unary_unary(ONCE)(b"", metadata=TENANT))
    assert error.reason == "internal"
    assert "secret" not in str(error)
    (record,) = [r for r in caplog.records if r.getMessage() == "unexpected error"]
    assert vars(record)["error_id"] == error.metadata["error_id"]
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])


async def test_an_error_from_a_peer_is_passed_on_with_its_details() -> None:
    async def missing(request: bytes, context: Any) -> bytes:
        raise NotFound("adapter_not_found", "no adapter billing", resource="adapters/billing")

    async with plain_channel(echo_service(once=missing)) as inner:

        async def forward(request: bytes, context: Any) -> Any:
            return await inner.unary_unary(ONCE)(request, metadata=TENANT)

        async def forward_badly(request: bytes, context: Any) -> AsyncIterator[bytes]:
            yield await inner.unary_unary("/lorafleet.test.v1.EchoService/Absent")(request, metadata=TENANT)

        async with plain_channel(echo_service(once=forward, stream=forward_badly)) as outer:
            error = await failure(outer.unary_unary(ONCE)(b"", metadata=TENANT))
            assert isinstance(error, NotFound)
            assert (error.reason, error.resource) == ("adapter_not_found", "adapters/billing")
            # Our own wrong call is not the caller's: it must not look like an answer to them.
            assert (await failure(outer.unary_stream(STREAM)(b"", metadata=TENANT))).reason == "internal"


async def test_a_dead_peer_is_unavailable_to_the_caller_too() -> None:
    async with foreign_channel("127.0.0.1:1") as nobody:

        async def forward(request: bytes, context: Any) -> Any:
            return await nobody.unary_unary(ONCE)(request)

        async with plain_channel(echo_service(once=forward)) as channel:
            error = await failure(channel.unary_unary(ONCE)(b"", metadata=TENANT))
    assert error.reason == "unavailable"


async def test_row_109_the_server_ends_calls_without_a_deadline() -> None:
    ended = asyncio.Event()

    async def sleep(request: bytes, context: Any) -> bytes:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return b""

    async def sleep_in_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await asyncio.sleep(30)

    settings = ServiceSettings(unary_timeout_seconds=0.2, stream_timeout_seconds=0.3)
    async with plain_channel(echo_service(once=sleep, stream=sleep_in_stream), settings) as channel:
        error = await failure(channel.unary_unary(ONCE)(b"", metadata=TENANT))
        assert (error.reason, error.limit) == ("deadline_exceeded", "0.2 s")
        assert ended.is_set()
        call = channel.unary_stream(STREAM)(b"", metadata=TENANT, timeout=600)
        assert await call.read() == b"first"
        assert (await failure(call)).limit == "0.3 s"


async def test_the_handler_knows_the_time_left_and_is_cancelled_at_the_end() -> None:
    left: list[float | None] = []
    cancelled = asyncio.Event()

    async def sleep(request: bytes, context: Any) -> bytes:
        left.append(call_context.remaining_seconds())
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return b""

    async with plain_channel(echo_service(once=sleep)) as channel:
        error = await failure(channel.unary_unary(ONCE)(b"", metadata=TENANT, timeout=0.3))
        assert error.code.value == "DEADLINE_EXCEEDED"
        async with asyncio.timeout(5):
            await cancelled.wait()
    assert left[0] is not None
    assert 0 < left[0] <= 0.3


async def test_a_time_out_inside_the_handler_is_not_the_deadline() -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)
        return b""

    async with plain_channel(echo_service(once=fail)) as channel:
        assert (await failure(channel.unary_unary(ONCE)(b"", metadata=TENANT))).reason == "internal"


async def test_a_cancelled_stream_closes_its_generator() -> None:
    closed = asyncio.Event()

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async with plain_channel(echo_service(stream=endless)) as channel:
        call = channel.unary_stream(STREAM)(b"", metadata=TENANT)
        assert await call.read() == b"x"
        call.cancel()
        async with asyncio.timeout(5):
            await closed.wait()


async def test_a_generator_that_waits_for_the_client_is_closed_before_its_call_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def flood(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1_000_000)
        finally:
            logging.getLogger("test.handler").info("closed")

    async with plain_channel(echo_service(stream=flood)) as channel:
        call = channel.unary_stream(STREAM)(b"", metadata=TENANT)
        await call.read()
        await asyncio.sleep(0.3)
        call.cancel()
        await ended_calls(caplog, 1)
    names = [record.name for record in caplog.records]
    assert names.index("test.handler") < names.index("lorafleet.access")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "tenant_missing"),
        ((("lorafleet-tenant", "acme"), ("lorafleet-tenant", "other")), "tenant_missing"),
        ((("lorafleet-tenant", "Acme"),), "bad_tenant"),
        ((("lorafleet-tenant", "a" * 33),), "bad_tenant"),
        ((("lorafleet-tenant", "../x"),), "bad_tenant"),
    ],
)
async def test_a_call_without_one_good_tenant_never_runs(
    metadata: tuple[tuple[str, str], ...], reason: str
) -> None:
    ran = False

    async def note(request: bytes, context: Any) -> bytes:
        nonlocal ran
        ran = True
        return b""

    async with plain_channel(echo_service(once=note)) as channel:
        error = await failure(channel.unary_unary(ONCE)(b"", metadata=metadata))
    assert error.reason == reason
    assert not ran


async def test_the_handler_sees_tenant_and_request_id() -> None:
    async def tell(request: bytes, context: Any) -> bytes:
        return f"{call_context.current_tenant()} {call_context.request_id()}".encode()

    async def tell_in_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield await tell(request, context)
        await asyncio.sleep(0)
        yield await tell(request, context)

    metadata = (*TENANT, ("x-request-id", "my.id-1"))
    async with plain_channel(echo_service(once=tell, stream=tell_in_stream)) as channel:
        assert await channel.unary_unary(ONCE)(b"", metadata=metadata) == b"acme my.id-1"
        answers = [m async for m in channel.unary_stream(STREAM)(b"", metadata=metadata)]
    assert answers == [b"acme my.id-1"] * 2
    assert call_context.tenant_or_none() is None


async def test_the_request_id_comes_back_even_with_an_error() -> None:
    async def own_trailer(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("x-own", "1"),))
        if request == b"fail":
            raise NotFound("nothing", "nothing there")
        return b""

    async with plain_channel(echo_service(once=own_trailer)) as channel:
        call = channel.unary_unary(ONCE)(b"", metadata=(*TENANT, ("x-request-id", "bad id!")))
        await call
        trailing = dict(await call.trailing_metadata())
        assert str(trailing["x-request-id"]).startswith("req-")
        assert trailing["x-own"] == "1"
        failing = channel.unary_unary(ONCE)(b"fail", metadata=(*TENANT, ("x-request-id", "mine")))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await failing
        assert is_ours(caught.value)
        assert ("x-own", "1") in tuple(caught.value.trailing_metadata())


async def test_one_access_line_per_call(caplog: pytest.LogCaptureFixture) -> None:
    async def maybe(request: bytes, context: Any) -> bytes:
        if request == b"fail":
            raise NotFound("nothing", "nothing there")
        if request == b"abort":
            await context.abort(grpc.StatusCode.ABORTED, "by hand")
        if request == b"slow":
            await asyncio.sleep(30)
        return b""

    caplog.set_level(logging.INFO, logger="lorafleet.access")
    async with plain_channel(echo_service(once=maybe)) as channel:
        method = channel.unary_unary(ONCE)
        await method(b"", metadata=TENANT, timeout=5)
        await failure(method(b"fail", metadata=TENANT))
        await failure(method(b"abort", metadata=TENANT))
        slow = method(b"slow", metadata=TENANT)
        await asyncio.sleep(0.1)
        slow.cancel()
        await ended_calls(caplog, 4)
    lines = [json.loads(JsonFormatter("test").format(record)) for record in caplog.records]
    assert [(line["code"], line["reason"]) for line in lines] == [
        ("OK", None),
        ("NOT_FOUND", "nothing"),
        ("ABORTED", None),
        ("CANCELLED", None),
    ]
    assert {line["method"] for line in lines} == {ONCE}
    assert {line["tenant"] for line in lines} == {"acme"}
    assert lines[0]["client_timeout_seconds"] == pytest.approx(5, abs=1)
    assert lines[1]["client_timeout_seconds"] is None
    assert all(line["ms"] >= 0 for line in lines)
