"""The access log: one line per call, however it ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from services.common.rpc.call import Call

_logger = logging.getLogger("lorafleet.access")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@asynccontextmanager
async def access_log_layer(call: Call) -> AsyncIterator[None]:
    """Log the call when it has ended; calls of health and reflection at DEBUG."""
    started = time.monotonic()
    try:
        yield
        call.code = _set_code(call)
    except asyncio.CancelledError:
        is_late = call.context.time_remaining() == 0
        call.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        raise
    except grpc.aio.AbortError:
        # Either the errors layer has filled the code in, or the method has called `abort` by itself.
        if call.code is grpc.StatusCode.OK:
            call.code = _set_code(call)
        raise
    finally:
        _logger.log(
            logging.INFO if call.is_ours else logging.DEBUG,
            "call ended",
            extra={
                "method": call.method,
                "code": call.code.name,
                "reason": call.reason,
                "ms": round((time.monotonic() - started) * 1000, 3),
                "client_timeout_seconds": call.client_timeout_seconds,
                "tenant": call.tenant,
                "peer": call.context.peer(),
            },
        )


def _set_code(call: Call) -> grpc.StatusCode:
    """Return the code on the servicer context, which grpc keeps as a number or as a member."""
    code: object = call.context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES[code or 0]  # type: ignore[index]
