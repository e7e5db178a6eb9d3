"""The request id: the caller's where it is well formed, else a new one; sent back as trailing metadata."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.call_context import call_scope
from services.common.ids import new_id
from services.common.rpc.call import Call

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def accepted_request_id(candidates: list[str]) -> str:
    """Return the one well-formed id among the caller's, or a new one: an id must not fail a call."""
    if len(candidates) == 1 and _REQUEST_ID.fullmatch(candidates[0]):
        return candidates[0]
    return new_id("req")


@asynccontextmanager
async def request_id_layer(call: Call) -> AsyncIterator[None]:
    """Give the call its request id.

    It goes into the trailing metadata, not the initial: a server that has sent its initial metadata has taken
    from the client the right to retry.
    """
    call.request_id = accepted_request_id(call.values(REQUEST_ID_KEY))
    _add_trailing(call)
    with call_scope(request_id=call.request_id):
        yield
    # The method may have set trailing metadata of its own, which replaces what was there.
    _add_trailing(call)


def _add_trailing(call: Call) -> None:
    present = tuple(call.context.trailing_metadata() or ())
    if all(key != REQUEST_ID_KEY for key, _ in present):
        call.context.set_trailing_metadata((*present, (REQUEST_ID_KEY, call.request_id)))
