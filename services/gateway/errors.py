"""Errors as OpenAI's API words them: one object, four keys, and the headers that clients act on."""

from __future__ import annotations

import math
from typing import Any

import grpc
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from services.common import status
from services.common.errors import (
    Code,
    Internal,
    InvalidArgument,
    LorafleetError,
    NotFound,
    Unavailable,
)
from services.gateway.limits import RateLimited

# What HTTP says more exactly than the canonical codes do.
_STATUS_BY_REASON = {
    "idempotency_key_reused": 422,
    "method_not_allowed": 405,
    "too_large": 413,
    "unsupported_media_type": 415,
}
_FINAL_CODES = frozenset({Code.ALREADY_EXISTS, Code.DATA_LOSS, Code.UNIMPLEMENTED})


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready; nobody is left to tell."""


def http_status(error: LorafleetError) -> int:
    """Return the HTTP status of an error."""
    return _STATUS_BY_REASON.get(error.reason) or status.http_status(error)


def error_body(error: LorafleetError) -> dict[str, Any]:
    """Return OpenAI's error object: `message`, `type`, `param` and `code`, the latter two null or text."""
    is_ours_to_say = http_status(error) >= 500 or error.reason not in _STATUS_BY_REASON
    return {
        "error": {
            "message": error.message,
            "type": status.openai_type(error) if is_ours_to_say else "invalid_request_error",
            "param": error.field,
            "code": error.reason,
        }
    }


def error_response(error: LorafleetError) -> JSONResponse:
    """Return the answer for an error."""
    return JSONResponse(error_body(error), status_code=http_status(error), headers=error_headers(error))


def error_headers(error: LorafleetError) -> dict[str, str]:
    """Return the headers of the answer for an error: `Retry-After` and `x-should-retry` where they matter.

    Stock clients try 409, 429 and 5xx again by themselves, so what can never succeed says so.
    """
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    if isinstance(error, RateLimited):
        headers |= error.headers
    if error.final or error.code in _FINAL_CODES:
        headers["x-should-retry"] = "false"
    if error.code is Code.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if http_status(error) == 413:
        # What is left of the body is not read: it would only be thrown away.
        headers["connection"] = "close"
    return headers


def from_upstream(error: grpc.RpcError) -> LorafleetError:
    """Return what a service reported; a failure of the transport loses its text, which names addresses."""
    if status.is_ours(error):
        return status.from_rpc_error(error)
    foreign = status.from_rpc_error(error)
    if foreign.code is Code.UNAVAILABLE:
        return Unavailable(
            foreign.reason, "a service behind this API cannot be reached now", retry_after_seconds=1
        )
    return type(foreign)(foreign.reason, f"a service behind this API ended the call: {foreign.code.value}")


def model_not_found() -> NotFound:
    """Return the one error for every model that this caller cannot use, whatever the reason."""
    return NotFound("model_not_found", "the model does not exist or you have no access to it", field="model")


def internal() -> Internal:
    """Return the error that stands for a fault of ours; the details are in the log, under the request id."""
    return Internal("internal", "the server failed; its operator finds the details under the request id")


async def on_lorafleet_error(_request: Request, error: Exception) -> Response:
    """Answer for an error of ours."""
    assert isinstance(error, LorafleetError)
    return error_response(error)


async def on_rpc_error(_request: Request, error: Exception) -> Response:
    """Answer for a failed call to a service."""
    assert isinstance(error, grpc.RpcError)
    return error_response(from_upstream(error))


async def on_http_exception(_request: Request, error: Exception) -> Response:
    """Answer for what the router refuses."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound("route_not_found", "there is no such route"))
    if error.status_code == 405:
        response = error_response(InvalidArgument("method_not_allowed", "the route has no such method"))
        response.headers.update(error.headers or {})
        return response
    return error_response(InvalidArgument("invalid_request", "the request cannot be read"))


async def on_bad_parameters(_request: Request, error: Exception) -> Response:
    """Answer for query parameters out of range."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return error_response(InvalidArgument("invalid_value", f"{field}: {first['msg']}", field=field))


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    """Give the access log its status; the connection is closed."""
    return Response(status_code=499)
