"""Errors as LoRAX words them: `error` and `error_type`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from services.common.errors import Code, InvalidArgument, LorafleetError
from services.gateway.errors import ClientGoneError, error_headers, from_upstream, http_status, internal

_logger = logging.getLogger("lorafleet.gateway.lorax")

# What LoRAX's client tells apart by `error_type`; of others it looks at the status.
_TYPES = {
    Code.INTERNAL: "generation",
    Code.DATA_LOSS: "generation",
    Code.UNKNOWN: "generation",
    Code.RESOURCE_EXHAUSTED: "overloaded",
    Code.UNAVAILABLE: "overloaded",
    Code.INVALID_ARGUMENT: "validation",
    Code.OUT_OF_RANGE: "validation",
    Code.FAILED_PRECONDITION: "validation",
}
_TYPES_BY_REASON = {
    "generation_aborted": "incomplete_generation",
    "incomplete_answer": "incomplete_generation",
    "too_large": "validation",
}
_UNPROCESSABLE = 422


def lorax_error(error: LorafleetError) -> dict[str, Any]:
    """Return LoRAX's error object; the reason stands in for `error_type` where LoRAX has no word."""
    kind = _TYPES_BY_REASON.get(error.reason) or _TYPES.get(error.code) or error.reason
    return {"error": error.message, "error_type": kind}


def lorax_response(error: LorafleetError) -> JSONResponse:
    """Return the answer for an error; what is wrong with a request is 422 here."""
    status = http_status(error)
    return JSONResponse(
        lorax_error(error),
        status_code=_UNPROCESSABLE if status == 400 else status,
        headers=error_headers(error),
    )


class LoraxRoute(APIRoute):
    """A route whose errors are worded as LoRAX's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the route's handler with our errors translated."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except LorafleetError as error:
                return lorax_response(error)
            except grpc.RpcError as error:
                return lorax_response(from_upstream(error))
            except RequestValidationError as error:
                return lorax_response(InvalidArgument("invalid_value", error.errors()[0]["msg"]))
            except (ClientGoneError, HTTPException):
                raise
            except Exception:
                _logger.exception("unexpected exception")
                return lorax_response(internal())

        return handle
