"""A TCP proxy before a store that can be slow, cut connections, or swallow everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FaultProxy:
    """Forwards to one server; the attributes may be changed while it runs.

    Attributes:
        port: where it listens, on the loopback interface.
        latency_seconds: wait before each piece of an answer is passed on.
        is_blackhole: take everything and answer nothing.
        cut_after_bytes: end a connection once so many bytes were answered on it; None: never.
        num_cuts_left: how many connections are cut that way.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.latency_seconds = 0.0
        self.is_blackhole = False
        self.cut_after_bytes: int | None = None
        self.num_cuts_left = 0

    async def start(self) -> None:
        """Listen, on the port of before where there was one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections and cut those that are open."""
        if self._server is not None:
            self._server.close()
        self._server = None
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._target)
            self._writers.add(up_writer)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass_on(reader, up_writer, is_answer=False))
                    group.create_task(self._pass_on(up_reader, writer, is_answer=True))
            finally:
                self._writers.discard(up_writer)
                up_writer.transport.abort()
        except* (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        num_bytes = 0
        while data := await source.read(64 * 1024):
            if self.is_blackhole:
                continue
            if is_answer:
                await asyncio.sleep(self.latency_seconds)
                num_bytes += len(data)
                limit = self.cut_after_bytes
                if limit is not None and num_bytes > limit and self.num_cuts_left > 0:
                    self.num_cuts_left -= 1
                    raise ConnectionResetError
            target.write(data)
            await target.drain()
        raise ConnectionResetError


@asynccontextmanager
async def fault_proxy(host: str, port: int) -> AsyncIterator[FaultProxy]:
    """Run a proxy before `host:port`."""
    proxy = FaultProxy(host, port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
