"""Loading adapters before anybody asks, when the registry tells that they are about to be asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import grpc

from lorafleet.registry.v1.adapter_pb2 import (
    ADAPTER_EVENT_TYPE_ALIAS_MOVED,
    ADAPTER_EVENT_TYPE_VERSION_READY,
    AdapterEvent,
    WatchAdaptersRequest,
)
from services.common import status
from services.common.call_context import call_scope, current_tenant
from services.common.errors import Code, LorafleetError
from services.inference.adapters.cache import AdapterCache
from services.inference.residency import Residency
from services.inference.resolver import AdapterResolver
from services.inference.sources import AdapterSources

if TYPE_CHECKING:
    from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

_logger = logging.getLogger("lorafleet.inference")

_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 30.0
_LOADS_AT_ONCE = 4
_RESUME_METADATA = "lorafleet-resume-token"


class EventPrefetch:
    """Watches the registry for some tenants and prefetches as far as the host, by rules that are opted in.

    A version is prefetched when one of `aliases` moves to it, and with `new_versions` when it is published
    for an adapter of which another version is in memory here. A failed prefetch is logged and forgotten: the
    request that comes later loads it, or hears why not.
    """

    def __init__(
        self,
        adapters: AdapterServiceAsyncStub,
        resolver: AdapterResolver,
        residency: Residency,
        cache: AdapterCache,
        sources: AdapterSources,
        *,
        aliases: Collection[str],
        new_versions: bool,
    ) -> None:
        self._adapters = adapters
        self._resolver = resolver
        self._residency = residency
        self._cache = cache
        self._sources = sources
        self._aliases = frozenset(aliases)
        self._new_versions = new_versions
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)

    async def watch(self, tenant: str) -> None:
        """Follow the events of one tenant until cancelled; what was missed while the registry was away is
        heard when it is back.
        """
        token = ""
        pause_seconds = _FIRST_PAUSE_SECONDS
        with call_scope(tenant=tenant):
            async with asyncio.TaskGroup() as loads:
                while True:
                    try:
                        call = self._adapters.WatchAdapters(WatchAdaptersRequest(resume_token=token))
                        token = token or await _first_token(call)
                        async for event in call:
                            token, pause_seconds = event.resume_token, _FIRST_PAUSE_SECONDS
                            ref = self._wanted(event)
                            if ref is not None:
                                loads.create_task(self._prefetch(ref))
                    except grpc.aio.AioRpcError as error:
                        refusal = status.from_rpc_error(error)
                        if refusal.code is Code.INVALID_ARGUMENT:
                            # The registry was rebuilt and does not know the place: go on from now.
                            token = ""
                        _logger.info("the registry's events stopped", extra={"reason": refusal.reason})
                    await asyncio.sleep(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, _MAX_PAUSE_SECONDS)

    def _wanted(self, event: AdapterEvent) -> str | None:
        """Return what to prefetch by a reference that always names the same version, if anything."""
        if event.type == ADAPTER_EVENT_TYPE_ALIAS_MOVED and event.alias.name in self._aliases:
            return f"{event.alias.adapter}@{event.alias.digest}"
        if event.type == ADAPTER_EVENT_TYPE_VERSION_READY and self._new_versions:
            version = event.version
            if self._is_in_memory(version.adapter):
                return f"{version.adapter}@{version.digest}"
        return None

    def _is_in_memory(self, adapter: str) -> bool:
        in_memory = self._cache.tiers()
        own = self._sources.of_tenant(current_tenant())
        return any(digest in in_memory and source.adapter == adapter for digest, source in own.items())

    async def _prefetch(self, ref: str) -> None:
        async with self._loads:
            try:
                source = await self._resolver.resolve(ref, field="adapter")
                await self._residency.prefetch(source)
                _logger.info("prefetched", extra={"version": source.version_ref})
            except LorafleetError as error:
                _logger.info("not prefetched", extra={"ref": ref, "reason": error.reason})


async def _first_token(call: grpc.aio.UnaryStreamCall[WatchAdaptersRequest, AdapterEvent]) -> str:
    """Return where a watch begins, so that it can be resumed even if it hears nothing."""
    for key, value in await call.initial_metadata() or ():
        if key == _RESUME_METADATA:
            return value if isinstance(value, str) else value.decode()
    return ""
