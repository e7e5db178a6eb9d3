"""Streams that are cut when their key is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from services.common.errors import Unauthenticated
from services.gateway import revocation
from services.gateway.revocation import guarded


class Key:
    """A key that is good until it is revoked."""

    def __init__(self) -> None:
        self.is_good = True
        self.asked = 0
        self.was_asked_thrice = asyncio.Event()

    async def check(self) -> None:
        self.asked += 1
        if self.asked == 3:
            self.was_asked_thrice.set()
        if not self.is_good:
            raise Unauthenticated("key_revoked", "the API key was revoked")


class Source:
    """Yields numbers up to `last`, then nothing for ever; notes how it was ended."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.is_closed = False

    async def items(self) -> AsyncGenerator[int]:
        try:
            for number in range(self.last):
                yield number
            await asyncio.Event().wait()
        finally:
            self.is_closed = True


@pytest.fixture(autouse=True)
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocation, "CHECK_SECONDS", 0.01)


async def numbers(count: int) -> AsyncGenerator[int]:
    for number in range(count):
        yield number


async def test_all_items_pass_in_order() -> None:
    assert [item async for item in guarded(numbers(100), Key().check)] == list(range(100))


async def test_a_stream_that_waits_is_cut() -> None:
    key, source, seen = Key(), Source(3), list[int]()

    async def read() -> None:
        async for item in guarded(source.items(), key.check):
            seen.append(item)
            key.is_good = item < 2

    with pytest.raises(Unauthenticated) as caught:
        await read()
    assert caught.value.reason == "key_revoked"
    assert seen == [0, 1, 2]
    assert source.is_closed
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_stream_whose_reader_is_slow_is_cut_at_its_next_item() -> None:
    key, seen = Key(), list[int]()

    async def read() -> None:
        async for item in guarded(numbers(100), key.check):
            seen.append(item)
            key.is_good = False
            await asyncio.sleep(0.1)

    with pytest.raises(Unauthenticated):
        await read()
    assert seen == [0]


async def test_a_stream_without_items_asks_all_the_same() -> None:
    key = Key()
    stream = guarded(Source(0).items(), key.check)
    waiting = asyncio.ensure_future(anext(stream))
    await key.was_asked_thrice.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    asked = key.asked
    await stream.aclose()
    await asyncio.sleep(0.05)
    assert key.asked <= asked + 1


async def test_whoever_cancels_the_reader_is_heard() -> None:
    """Also at the moment at which the key is found revoked."""
    source = Source(1)

    async def read() -> None:
        async for _ in guarded(source.items(), revoked_and_cancelled):
            pass

    async def revoked_and_cancelled() -> None:
        reading.cancel()
        raise Unauthenticated("key_revoked", "the API key was revoked")

    reading = asyncio.create_task(read())
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert source.is_closed


async def test_an_error_of_the_source_passes_and_the_asking_ends() -> None:
    async def failing() -> AsyncGenerator[int]:
        yield 1
        raise ValueError("broken")

    key = Key()
    stream = guarded(failing(), key.check)
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        await anext(stream)
    asked = key.asked
    await asyncio.sleep(0.05)
    assert key.asked <= asked + 1
