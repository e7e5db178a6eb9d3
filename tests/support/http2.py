"""HTTP/2 frames by hand (RFC 9113), for what no well-behaved client sends."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8
ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame: type, flags, stream and payload."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @classmethod
    def reset(cls, stream: int) -> Frame:
        """Gives a stream up."""
        return cls(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))

    def encoded(self) -> bytes:
        """The frame's bytes."""
        length = struct.pack(">I", len(self.payload))[1:]
        return length + struct.pack(">BBI", self.kind, self.flags, self.stream) + self.payload


def headers(stream: int, path: str, metadata: Sequence[tuple[str, str]]) -> Frame:
    """The headers of a gRPC call; no field is indexed or compressed."""
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *metadata,
    ]
    return Frame(HEADERS, END_HEADERS, stream, b"".join(_literal(name, value) for name, value in fields))


def _literal(name: str, value: str) -> bytes:
    assert len(name) < 127, "longer lengths take more than one byte"
    assert len(value) < 127, "longer lengths take more than one byte"
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Connection:
    """A client's end of a connection, after the exchange of settings."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @asynccontextmanager
    async def open(cls, address: str) -> AsyncIterator[Connection]:
        """Connect to `HOST:PORT`."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(PREFACE + Frame(SETTINGS, 0, 0, b"").encoded())
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def send(self, frame: Frame, message: bytes | None = None) -> None:
        """Send a frame and then, where given, a message that ends its stream."""
        self._writer.write(frame.encoded())
        if message is not None:
            self._writer.write(Frame(DATA, END_STREAM, frame.stream, message).encoded())
        await self._writer.drain()

    async def ping_until_goaway(self, limit: int) -> int | None:
        """Ping, wait for the answer, and again; return the reason's number when the server has had enough."""
        async with asyncio.timeout(ANSWER_SECONDS):
            for _ in range(limit):
                await self.send(Frame(PING, 0, 0, bytes(8)))
                while (frame := await self._next()).kind not in {PING, GOAWAY}:
                    pass
                if frame.kind == GOAWAY:
                    code: int = struct.unpack(">I", frame.payload[4:8])[0]
                    return code
        return None

    async def ends(self, stream: int) -> bool:
        """Read until the stream ends; return whether it was ended by headers or by a reset."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                frame = await self._next()
                if frame.stream == stream and (frame.kind == RST_STREAM or frame.flags & END_STREAM):
                    return frame.kind in {HEADERS, RST_STREAM}

    async def _next(self) -> Frame:
        head = await self._reader.readexactly(9)
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        return Frame(kind, flags, stream, await self._reader.readexactly(int.from_bytes(head[:3], "big")))
