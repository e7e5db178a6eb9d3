"""A body of bytes that comes from a service."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

import grpc
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.disconnect import race
from services.gateway.errors import ClientGoneError, error_response, from_upstream

_logger = logging.getLogger("lorafleet.gateway.bytes")


class ByteStream(Response):
    """Sends chunks as they come; the source is closed when they end, fail or the client leaves.

    A failure before the first chunk is answered as an error. A later one cuts the connection, since
    the declared length has not been reached.
    """

    media_type = "application/octet-stream"

    def __init__(
        self, source: AsyncGenerator[bytes], *, on_close: Callable[[], object], headers: Mapping[str, str]
    ) -> None:
        """Take the chunks, and what frees their source: it is called in any case, even before the first."""
        self._source = source
        self._on_close = on_close
        self.status_code = 200
        self.background = None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole body."""
        try:
            await race(receive, self._send_all(scope, receive, send))
        except ClientGoneError:
            _logger.info("the client left the download")
        finally:
            self._on_close()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source) as source:
            try:
                first = await anext(source, b"")
            except grpc.RpcError as error:
                await error_response(from_upstream(error))(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for chunk in source:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
