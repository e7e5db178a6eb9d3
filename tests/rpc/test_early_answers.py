"""A server that has made up its mind before the client has sent everything is still understood."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from services.common import status
from services.common.errors import InvalidArgument
from tests.support.rpc import COLLECT, TENANT, echo_service, foreign_channel, running_host

ROUNDS = 100
CHUNK = b"x" * 300


async def chunks() -> AsyncIterator[bytes]:
    """Small messages with other work in between: the answer comes while the next one is being written."""
    for _ in range(20):
        yield CHUNK
        await asyncio.sleep(0)


async def test_a_refusal_reaches_a_client_that_is_still_sending() -> None:
    async def refuse(requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            raise InvalidArgument("bad_header", "the first message will not do", field="header")
        return b""

    async with (
        running_host(echo_service(collect=refuse)) as (_, address),
        foreign_channel(address) as channel,
    ):
        for _ in range(ROUNDS):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.stream_unary(COLLECT)(chunks(), metadata=TENANT)
            assert status.from_rpc_error(caught.value).reason == "bad_header"


async def test_an_early_answer_reaches_a_client_that_is_still_sending() -> None:
    async def answer(requests: AsyncIterator[bytes], context: Any) -> bytes:
        async for _ in requests:
            return b"known already"
        return b""

    async with (
        running_host(echo_service(collect=answer)) as (_, address),
        foreign_channel(address) as channel,
    ):
        for _ in range(ROUNDS):
            assert await channel.stream_unary(COLLECT)(chunks(), metadata=TENANT) == b"known already"


async def test_a_client_that_never_stops_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.rpc.remainder.LIMIT_MESSAGES", 5)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x"

    async def refuse(requests: AsyncIterator[bytes], context: Any) -> bytes:
        raise InvalidArgument("bad_header", "nothing will do")

    async with (
        running_host(echo_service(collect=refuse)) as (_, address),
        foreign_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.stream_unary(COLLECT)(endless(), metadata=TENANT)
    assert sent < 100_000
