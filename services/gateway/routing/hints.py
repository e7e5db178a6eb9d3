"""Which version a name stands for, as far as routing cares.

Inference resolves a request's name when it admits it, and alone decides. What is remembered here only says
where the request is sent, so that an alias that moved a moment ago costs a load and never an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from lorafleet.registry.v1.adapter_pb2 import ResolveVersionRequest
from services.common import call_context

if TYPE_CHECKING:
    from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

FRESH_SECONDS = 5.0
RESOLVE_TIMEOUT_SECONDS = 2.0
MAX_NAMES = 20_000


class DigestHints:
    """Digests by tenant and name; one look-up at a time for each, however many ask."""

    def __init__(
        self, adapters: AdapterServiceAsyncStub, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._adapters = adapters
        self._clock = clock
        self._known: OrderedDict[tuple[str | None, str], tuple[float, asyncio.Task[str]]] = OrderedDict()

    async def digest(self, ref: str) -> str:
        """Return the digest that the caller's reference names; what stands for it where nobody can tell."""
        pinned = ref.partition("@")[2]
        if pinned.startswith("sha256:"):
            return pinned
        key = (call_context.tenant_or_none(), ref)
        until, task = self._known.get(key, (0.0, None))
        if task is None or (task.done() and self._clock() >= until):
            task = asyncio.create_task(self._resolve(ref), name="digest hint")
            self._known[key] = (self._clock() + FRESH_SECONDS, task)
            self._known.move_to_end(key)
            if len(self._known) > MAX_NAMES:
                self._known.popitem(last=False)
        # One caller that leaves must not end the look-up of the others.
        return await asyncio.shield(task)

    async def _resolve(self, ref: str) -> str:
        try:
            request = ResolveVersionRequest(ref=ref)
            version = await self._adapters.ResolveVersion(request, timeout=RESOLVE_TIMEOUT_SECONDS)
        except grpc.RpcError:
            # Inference finds the same and says so, or knows better. The name still has a place on the ring.
            return f"{call_context.tenant_or_none()} {ref}"
        return version.digest
