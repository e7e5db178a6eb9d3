"""Server-sent events: one JSON object per event, and an error object at a bad end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.common.errors import LorafleetError
from services.gateway.disconnect import race
from services.gateway.errors import ClientGoneError, error_body, from_upstream, internal
from services.gateway.revocation import Check, guarded

_logger = logging.getLogger("lorafleet.gateway.sse")

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an API ends its streams.

    Attributes:
        done: what follows the last object of a good end.
        error: the object of a bad end.
    """

    done: bytes
    error: Callable[[LorafleetError], Mapping[str, Any]]


OPENAI = Dialect(DONE, error_body)


class EventStream(Response):
    """Sends objects as they come; closes their source when they end, fail or the client leaves."""

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[Mapping[str, Any]],
        *,
        on_close: Callable[[], object],
        check: Check,
        headers: Mapping[str, str] | None = None,
        dialect: Dialect = OPENAI,
    ) -> None:
        """Take the objects to send, what frees their source (it is called in any case), and what raises once
        the client may no longer have them.
        """
        self._dialect = dialect
        self._source = source
        self._check = check
        self._on_close = on_close
        self.status_code = 200
        self.background = None
        # Proxies that buffer would turn a stream into one late answer.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        try:
            await race(receive, self._send_all(send))
        except ClientGoneError:
            _logger.info("the client left the stream")
        finally:
            self._on_close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = self._dialect.done
        async with aclosing(self._source) as source:
            try:
                async for item in guarded(source, self._check):
                    await send({"type": "http.response.body", "body": event(item), "more_body": True})
            except LorafleetError as error:
                last = event(self._dialect.error(error))
            except grpc.RpcError as error:
                last = event(self._dialect.error(from_upstream(error)))
            except Exception:
                _logger.exception("unexpected exception in a stream")
                last = event(self._dialect.error(internal()))
        await send({"type": "http.response.body", "body": last, "more_body": False})


def event(item: Mapping[str, Any]) -> bytes:
    """Return one event. JSON in ASCII escapes every line break and control character of a text."""
    text = json.dumps(item, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("ascii")
