"""How many streams of bytes move at a time, so that memory stays flat however many have come.

A stream that moves holds a few chunks and copies of them; one that waits for its turn holds what its flow
control window lets in, or nothing where bytes go out. Turns are given in order of arrival. One whose peer is
slow gives its turn up for as long as it waits for that peer, so slow peers keep nobody from moving.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Self, TypeVar

_T = TypeVar("_T")

PATIENCE_SECONDS = 1.0


class Transfers:
    """The turns of one process: at most `most` at a time."""

    def __init__(self, most: int, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._turns = asyncio.Semaphore(most)
        self._patience_seconds = patience_seconds

    async def incoming(self, messages: AsyncIterator[_T]) -> AsyncGenerator[_T, None]:
        """Yield what a client sends, while it is this stream's turn."""
        async with _Turn(self._turns, self._patience_seconds) as turn:
            while True:
                with turn.away():
                    message = await anext(messages, None)
                await turn.take()
                if message is None:
                    return
                yield message
                # Else it would lie here while the next one is waited for.
                del message

    async def outgoing(self, pieces: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
        """Yield what goes to a client, read while it is this stream's turn."""
        async with _Turn(self._turns, self._patience_seconds) as turn, aclosing(pieces):
            async for piece in pieces:
                with turn.away():
                    yield piece
                await turn.take()


class _Turn:
    """One stream's leave to move bytes."""

    def __init__(self, turns: asyncio.Semaphore, patience_seconds: float) -> None:
        self._turns = turns
        self._patience_seconds = patience_seconds
        self._is_held = False

    async def __aenter__(self) -> Self:
        await self.take()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self._give_back()

    async def take(self) -> None:
        """Return with the turn in hand."""
        if not self._is_held:
            await self._turns.acquire()
            self._is_held = True

    @contextmanager
    def away(self) -> Iterator[None]:
        """Wait for the peer inside; a turn is given up where that outlasts the patience. `take` it then."""
        timer = asyncio.get_running_loop().call_later(self._patience_seconds, self._give_back)
        try:
            yield
        finally:
            timer.cancel()

    def _give_back(self) -> None:
        if self._is_held:
            self._is_held = False
            self._turns.release()
