"""HTTP/1.1 connections: uvicorn's, strict about what may be read in two ways, and with an end to all waiting.

    a head (request line and headers) that does not come      408 after `header_timeout_seconds`
    a body of which too little comes                          closed after `body_timeout_seconds`
    an answer that is not read                                closed after `stalled_timeout_seconds`
    a head that is too large                                  431
    a request that a proxy might read otherwise than we do    400, and nothing after it is looked at

A closed connection reaches the request as the client's leaving, which frees its work.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import ClassVar

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.gateway.config import GatewaySettings

HEAD_LIMIT_BYTES = 32 * 1024
CHUNK_HEAD_LIMIT_BYTES = 256
# What must come of a body in each period of `body_timeout_seconds`.
MIN_BODY_BYTES = 32 * 1024
_TOO_LARGE = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
_REASONS = {
    HTTPStatus.REQUEST_TIMEOUT: ("request_timeout", "the request did not come in time"),
    _TOO_LARGE: (
        "headers_too_large",
        f"the head of the request is larger than {HEAD_LIMIT_BYTES} bytes",
    ),
}
_UNREADABLE = ("invalid_request", "the request cannot be read")


class StrictBuffer(ReceiveBuffer):
    """Received bytes, out of which only one reading is possible.

    h11 takes line breaks without a carriage return, folded headers and both kinds of length at once, as
    servers once had to. Where a proxy reads these otherwise, one request becomes two.
    """

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a head or of a trailer; None as long as they are not whole."""
        before = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is not None:
            head = before[: len(before) - len(self)]
            # h11 bounds only what is not whole yet, and a large head may come whole.
            if len(head) > HEAD_LIMIT_BYTES:
                raise h11.RemoteProtocolError("the head is too large", _TOO_LARGE)
            _check_line_breaks(head)
            _check_lines(lines)
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """Return the line before a chunk; None as long as it is not whole."""
        line = super().maybe_extract_next_line()
        if len(self if line is None else line) > CHUNK_HEAD_LIMIT_BYTES:
            raise h11.RemoteProtocolError("the line before a chunk is too long")
        if line is not None:
            _check_line_breaks(bytes(line))
        return line


def _check_line_breaks(text: bytes) -> None:
    breaks = text.count(b"\r\n")
    if text.count(b"\n") != breaks or text.count(b"\r") != breaks:
        raise h11.RemoteProtocolError("lines must end with CR LF")


def _check_lines(lines: list[bytearray]) -> None:
    names = [bytes(line).partition(b":")[0].strip().lower() for line in lines]
    if any(line.startswith((b" ", b"\t")) for line in lines):
        raise h11.RemoteProtocolError("headers must not be folded")
    lengths = names.count(b"content-length")
    if lengths > 1 or (lengths and b"transfer-encoding" in names):
        raise h11.RemoteProtocolError("the length of the body is given twice")


class GatewayProtocol(H11Protocol):
    """One connection."""

    settings: ClassVar[GatewaySettings]

    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _received_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, and not for ever."""
        # The one place where h11 cuts heads into lines; it offers no other way in.
        self.conn._receive_buffer = StrictBuffer()
        super().connection_made(transport)
        # As between two requests: whoever connects before there is a request may be a pool.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and see what is waited for now."""
        self._received_bytes += len(data)
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client does not read: wait for it, and not for ever."""
        super().pause_writing()
        seconds = self.settings.stalled_timeout_seconds
        self._write_timer = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read as a request, and close; called while the error is handled."""
        hint = getattr(sys.exception(), "error_status_hint", HTTPStatus.BAD_REQUEST)
        self._refuse(HTTPStatus(hint))

    def _watch(self) -> None:
        """Start the clocks of what is waited for, and stop the others."""
        state = self.conn.their_state
        is_head_due = state is h11.IDLE and bool(self.conn.trailing_data[0])
        # A head has one period from its first byte on, whatever comes in between.
        if not is_head_due and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif is_head_due and self._head_timer is None:
            seconds = self.settings.header_timeout_seconds
            self._head_timer = self.loop.call_later(seconds, self._refuse, HTTPStatus.REQUEST_TIMEOUT)
        if state is not h11.SEND_BODY and self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        elif state is h11.SEND_BODY and self._body_timer is None:
            self._expect_body()

    def _expect_body(self) -> None:
        seconds = self.settings.body_timeout_seconds
        self._body_timer = self.loop.call_later(seconds, self._check_body, self._received_bytes)

    def _check_body(self, received_before: int) -> None:
        is_slow = self._received_bytes - received_before < MIN_BODY_BYTES
        # Where it is we who do not read, the client is not late.
        if is_slow and not self.flow.read_paused:
            self.transport.abort()
        else:
            self._expect_body()

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer that a request cannot be taken, unless an answer has begun, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        code, message = _REASONS.get(status, _UNREADABLE)
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = json.dumps({"error": error}).encode("ascii")
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


def protocol_class(settings: GatewaySettings) -> type[GatewayProtocol]:
    """Return the class of connections with a gateway's settings; uvicorn makes them itself."""
    return type("ConfiguredProtocol", (GatewayProtocol,), {"settings": settings})
