"""The outermost layer of our own: request id, access log, and the end of unexpected exceptions."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.call_context import call_scope
from services.common.errors import capped
from services.common.rpc.request_id import REQUEST_ID_KEY, accepted_request_id
from services.gateway.errors import error_response, internal

_logger = logging.getLogger("lorafleet.access")
_HEADER = REQUEST_ID_KEY.encode("ascii")
_PATH_LIMIT_CHARS = 200
_CLIENT_CLOSED = 499
# Asked for every few seconds by whatever supervises the process.
_QUIET_PATHS = frozenset({"/health", "/readyz"})


class RequestBoundary:
    """Gives each request its id, which goes back as `x-request-id`, and logs it when it has ended.

    An exception that nobody translated becomes a 500 without details, or cuts the connection where the answer
    has begun, so that half an answer never looks whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == _HEADER]
        request_id = accepted_request_id(given)
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (_HEADER, request_id.encode("ascii"))]
            await send(message)

        scope.setdefault("state", {})
        with call_scope(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                _logger.exception("unexpected exception")
                if status:
                    raise
                await error_response(internal())(scope, receive, send_with_id)
            finally:
                _log(scope, status or _CLIENT_CLOSED, time.monotonic() - started)


def _log(scope: Scope, status: int, seconds: float) -> None:
    _logger.log(
        logging.DEBUG if scope["path"] in _QUIET_PATHS else logging.INFO,
        "request ended",
        extra={
            "method": scope["method"],
            # Without the query, which may hold what a caller holds private.
            "path": capped(scope["path"], _PATH_LIMIT_CHARS),
            "status": status,
            "ms": round(seconds * 1000, 3),
            "tenant": scope["state"].get("tenant"),
            "peer": scope["client"][0] if scope.get("client") else None,
        },
    )
