"""A TCP proxy that can fall silent, as a network does when a cable is pulled: nothing moves, nothing ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TcpProxy:
    """Passes bytes between its clients and one server while `to_server` and `to_client` are set."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []
        self.to_server = asyncio.Event()
        self.to_client = asyncio.Event()
        self.to_server.set()
        self.to_client.set()
        self.address = ""
        self._listener: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen, on the same port as before."""
        port = int(self.address.rpartition(":")[2] or 0)
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def shut(self) -> None:
        """Refuse connections, and drop those that there are."""
        if self._listener is not None:
            self._listener.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()

    def cut(self) -> None:
        """Hold everything back, both ways, without closing a connection."""
        self.to_server.clear()
        self.to_client.clear()

    def mend(self) -> None:
        """Pass on what was held back, and what comes."""
        self.to_server.set()
        self.to_client.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, far_writer]
        self._pumps.append(asyncio.create_task(_pump(reader, far_writer, self.to_server)))
        self._pumps.append(asyncio.create_task(_pump(far_reader, writer, self.to_client)))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_open: asyncio.Event) -> None:
    while data := await reader.read(65_536):
        await is_open.wait()
        writer.write(data)
        await writer.drain()
    await is_open.wait()
    writer.close()


@asynccontextmanager
async def tcp_proxy(address: str) -> AsyncIterator[TcpProxy]:
    """Run a proxy on a free port in front of the server at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    proxy = TcpProxy(host, int(port))
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.shut()
