"""Leases at the registry on the versions that requests and pins hold here.

A leased version's bytes are not collected even after somebody has deleted it, so what runs can be loaded
again until it ends. A lease is renewed while it is needed, given back soon after, and ends by itself where
this process dies. Collection waits for longer than any lease after a deletion, so a version need not be
leased from the first moment: what is held for less than `PATIENCE_SECONDS` costs the registry no call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from lorafleet.registry.v1.adapter_pb2 import AcquireLeaseRequest, ReleaseLeaseRequest
from services.common import status
from services.common.call_context import call_scope
from services.common.errors import Code, LorafleetError
from services.inference.adapters.cache import AdapterCache
from services.inference.sources import AdapterSource, AdapterSources

if TYPE_CHECKING:
    from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

_logger = logging.getLogger("lorafleet.inference")

TTL_SECONDS = 60
PATIENCE_SECONDS = 1.0
_LINGER_SECONDS = 5.0
_INTERVAL_SECONDS = 0.5
_CALL_TIMEOUT_SECONDS = 5.0
_CALLS_AT_ONCE = 8


@dataclass(slots=True)
class _Hold:
    """A version that is held here: since when, until when by the last look, and the lease on it.

    `is_refused` is set where the registry knows the version no more; asking again would not help.
    """

    source: AdapterSource
    since: float
    last_seen: float
    renewed_at: float | None = None
    is_refused: bool = False


class RegistryLeases:
    """Looks at what is held and keeps the registry's leases in step; belongs to one event loop."""

    def __init__(
        self,
        adapters: AdapterServiceAsyncStub,
        cache: AdapterCache,
        sources: AdapterSources,
        holder: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take leases in the name of `holder`."""
        self._adapters = adapters
        self._cache = cache
        self._sources = sources
        self._holder = holder
        self._clock = clock
        self._holds: dict[str, _Hold] = {}
        self._calls = asyncio.Semaphore(_CALLS_AT_ONCE)

    async def run(self) -> None:
        """Keep in step until cancelled; then give all leases back, so far as the registry answers."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(_INTERVAL_SECONDS)
        finally:
            leased = [hold for hold in self._holds.values() if hold.renewed_at is not None]
            self._holds.clear()
            # What cannot be given back in time ends by itself.
            with suppress(TimeoutError):
                async with asyncio.timeout(_CALL_TIMEOUT_SECONDS):
                    await self._each(self._release, leased)

    async def look(self) -> None:
        """Note what is held now; take, renew and give back what is due."""
        now = self._clock()
        for digest in self._cache.held():
            hold = self._holds.get(digest)
            source = self._sources.get(digest) if hold is None else hold.source
            if hold is not None:
                hold.last_seen = now
            elif source is not None:
                self._holds[digest] = _Hold(source, since=now, last_seen=now)
        gone = [hold for hold in self._holds.values() if self._is_gone(hold, now)]
        for hold in gone:
            del self._holds[hold.source.digest]
        await self._each(self._release, [hold for hold in gone if hold.renewed_at is not None])
        await self._each(self._renew, [hold for hold in self._holds.values() if self._is_due(hold, now)])

    def _is_gone(self, hold: _Hold, now: float) -> bool:
        """Whether nobody has held it for a while; one that was never leased is forgotten at once."""
        if hold.renewed_at is None:
            return hold.last_seen < now
        return now - hold.last_seen >= _LINGER_SECONDS

    def _is_due(self, hold: _Hold, now: float) -> bool:
        if hold.is_refused or hold.last_seen < now:
            return False
        if hold.renewed_at is None:
            return now - hold.since >= PATIENCE_SECONDS
        return now - hold.renewed_at >= TTL_SECONDS / 3

    async def _renew(self, hold: _Hold) -> None:
        request = AcquireLeaseRequest(digest=hold.source.digest, holder=self._holder, ttl_seconds=TTL_SECONDS)
        asked_at = self._clock()
        try:
            with call_scope(tenant=hold.source.tenant):
                await self._adapters.AcquireLease(request, timeout=_CALL_TIMEOUT_SECONDS)
            hold.renewed_at = asked_at
        except grpc.aio.AioRpcError as error:
            refusal = status.from_rpc_error(error)
            hold.is_refused = refusal.code is Code.NOT_FOUND
            _log_refusal("a version could not be leased", hold, refusal)

    async def _release(self, hold: _Hold) -> None:
        request = ReleaseLeaseRequest(digest=hold.source.digest, holder=self._holder)
        try:
            with call_scope(tenant=hold.source.tenant):
                await self._adapters.ReleaseLease(request, timeout=_CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            _log_refusal(
                "a lease could not be given back; it ends by itself", hold, status.from_rpc_error(error)
            )

    async def _each(self, work: Callable[[_Hold], Awaitable[None]], holds: Iterable[_Hold]) -> None:
        async def one(hold: _Hold) -> None:
            async with self._calls:
                await work(hold)

        await asyncio.gather(*(one(hold) for hold in holds))


def _log_refusal(what: str, hold: _Hold, refusal: LorafleetError) -> None:
    _logger.warning(what, extra={"version": hold.source.version_ref, "reason": refusal.reason})
