"""Work for a client that may leave: then the work is cancelled, and with it the calls it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from services.gateway.errors import ClientGoneError

ResultT = TypeVar("ResultT")


async def while_connected(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Return what `work` returns; the body of the request must have been read.

    Raises:
        ClientGoneError: the client closed the connection first; `work` was cancelled and has ended.
    """
    return await race(request.receive, work)


async def race(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
