"""Whatever a method raises ends the call with a rich status; nobody outside sees a stack trace."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from services.common import status
from services.common.errors import Code, Internal, LorafleetError, Unimplemented
from services.common.ids import new_id
from services.common.rpc.call import Call

_logger = logging.getLogger("lorafleet.rpc")

# What a peer reports in these codes is true of our own call as well, with or without details.
_PASSED_ON = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.RESOURCE_EXHAUSTED})


@asynccontextmanager
async def errors_layer(call: Call) -> AsyncIterator[None]:
    """Translate errors: ours by the table, a peer's passed on, all others to `INTERNAL` with an error id."""
    try:
        yield
    except LorafleetError as error:
        await _abort(call, error)
    except grpc.aio.AbortError:
        raise
    except grpc.RpcError as error:
        await _abort(call, _from_peer(call, error))
    except NotImplementedError as error:
        # A stub's own method sets the code before it raises; one of ours that raises this is a mistake.
        is_left_out = call.context.code() is grpc.StatusCode.UNIMPLEMENTED
        await _abort(call, _left_out(call) if is_left_out else _unexpected(call, error))
    except Exception as error:  # noqa: BLE001 - logged with its trace, answered by an id
        await _abort(call, _unexpected(call, error))


def _from_peer(call: Call, error: grpc.RpcError) -> LorafleetError:
    translated = status.from_rpc_error(error)
    if status.is_ours(error) or translated.code in _PASSED_ON:
        return translated
    return _unexpected(call, error)


def _left_out(call: Call) -> Unimplemented:
    return Unimplemented("not_implemented", f"this server does not offer {call.method}")


def _unexpected(call: Call, error: Exception) -> Internal:
    error_id = new_id("err")
    _logger.error("unexpected error", exc_info=error, extra={"error_id": error_id, "method": call.method})
    return Internal(
        "internal", f"an internal error occurred; its id is {error_id}", metadata={"error_id": error_id}
    )


async def _abort(call: Call, error: LorafleetError) -> None:
    call.code, call.reason = status.grpc_code(error.code), error.reason
    rich = status.to_status(error)
    trailing = (
        *(call.context.trailing_metadata() or ()),
        (status.STATUS_DETAILS_KEY, rich.SerializeToString()),
    )
    await call.context.abort(call.code, rich.message, trailing)
