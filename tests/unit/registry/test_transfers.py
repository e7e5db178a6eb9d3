"""Turns: never more at once than allowed, and none held by a stream that waits for a slow peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from services.registry.transfers import Transfers


async def counted(number: int, moving: list[int]) -> AsyncGenerator[int, None]:
    for _ in range(number):
        moving.append(1)
        await asyncio.sleep(0)
        yield len(moving)
        moving.pop()


async def test_no_more_move_at_once_than_allowed() -> None:
    transfers = Transfers(2)
    moving: list[int] = []
    most = 0

    async def move() -> None:
        nonlocal most
        async with aclosing(transfers.outgoing(counted(5, moving))) as pieces:
            async for found in pieces:
                most = max(most, found)

    await asyncio.gather(*(move() for _ in range(10)))
    assert most == 2


async def test_a_reader_that_stalls_gives_its_turn_up_and_gets_another() -> None:
    transfers = Transfers(1, patience_seconds=0.05)
    async with aclosing(transfers.outgoing(counted(2, []))) as stalled:
        await anext(stalled)
        async with asyncio.timeout(5):
            assert [piece async for piece in transfers.outgoing(counted(3, []))] == [1, 1, 1]
        await anext(stalled)
        with pytest.raises(StopAsyncIteration):
            await anext(stalled)


async def test_a_sender_that_stalls_gives_its_turn_up() -> None:
    transfers = Transfers(1, patience_seconds=0.05)
    more = asyncio.Event()

    async def sent() -> AsyncGenerator[bytes, None]:
        yield b"a"
        await more.wait()
        yield b"b"

    async def take() -> list[bytes]:
        return [message async for message in transfers.incoming(sent())]

    slow = asyncio.create_task(take())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        assert len([piece async for piece in transfers.outgoing(counted(3, []))]) == 3
    assert not slow.done()
    more.set()
    assert await slow == [b"a", b"b"]


async def test_a_stream_that_ends_early_gives_its_turn_back() -> None:
    transfers = Transfers(1)
    for _ in range(3):
        async with aclosing(transfers.outgoing(counted(5, []))) as pieces:
            await anext(pieces)
    waiting = asyncio.create_task(anext(transfers.outgoing(counted(1, []))))
    async with aclosing(transfers.outgoing(counted(5, []))) as pieces:
        await anext(pieces)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    async with asyncio.timeout(5), aclosing(transfers.outgoing(counted(1, []))) as pieces:
        await anext(pieces)
