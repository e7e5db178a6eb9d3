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
        bytes_per_second: the pace of answers; None: as they come.
        num_slow_downs_left: how many requests are answered 503 SlowDown, as an overloaded S3 store does.
        num_slow_downs: how many were.
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
        self.bytes_per_second: int | None = None
        self.num_slow_downs_left = 0
        self.num_slow_downs = 0

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
            if self.num_slow_downs_left > 0:
                await self._slow_down(reader, writer)
                return
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

    async def _slow_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_slow_downs_left -= 1
        self.num_slow_downs += 1
        await reader.readuntil(b"\r\n\r\n")
        body = (
            b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"
        )
        head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        await writer.drain()
        writer.write_eof()
        # An answer that comes before the request has ended must not be lost to a reset.
        while await reader.read(64 * 1024):
            pass

    async def drop_idle(self) -> None:
        """Cut the connections that are open; new ones are served."""
        for writer in tuple(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _pass_on(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        num_bytes = 0
        while data := await source.read(64 * 1024):
            if self.is_blackhole:
                continue
            if not is_answer:
                target.write(data)
                await target.drain()
                continue
            for piece in self._pieces(data):
                await asyncio.sleep(self.latency_seconds)
                if self.bytes_per_second is not None:
                    await asyncio.sleep(len(piece) / self.bytes_per_second)
                num_bytes += len(piece)
                limit = self.cut_after_bytes
                if limit is not None and num_bytes > limit and self.num_cuts_left > 0:
                    self.num_cuts_left -= 1
                    raise ConnectionResetError
                target.write(piece)
                await target.drain()
        raise ConnectionResetError

    def _pieces(self, data: bytes) -> list[bytes]:
        """What was read at once, a tenth of a second each: the pace may be set after a read began."""
        if self.bytes_per_second is None:
            return [data]
        size = max(1, self.bytes_per_second // 10)
        return [data[start : start + size] for start in range(0, len(data), size)]


@asynccontextmanager
async def fault_proxy(host: str, port: int) -> AsyncIterator[FaultProxy]:
    """Run a proxy before `host:port`."""
    proxy = FaultProxy(host, port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
