"""Adapters in memory, as an operator sees and moves them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.inference.v1.inference_service_pb2 import (
    TIER_DEVICE,
    TIER_DISK,
    TIER_FAILED,
    TIER_HOST,
    TIER_LOADING,
    TIER_UNSPECIFIED,
    ResidentAdapter,
)
from services.common.errors import Code, FailedPrecondition, LorafleetError, Unavailable
from services.inference.adapters.cache import AdapterCache
from services.inference.adapters.entry import AdapterResidency, AdapterState
from services.inference.pins import PinRecord
from services.inference.sources import AdapterSource, AdapterSources

_logger = logging.getLogger("lorafleet.inference")

_POLL_SECONDS = 0.02
_RESTORE_PAUSE_SECONDS = 1.0
_MAX_RESTORE_PAUSE_SECONDS = 60.0
_TIERS = {
    AdapterState.FETCHING: TIER_LOADING,
    AdapterState.HOST: TIER_HOST,
    AdapterState.DEVICE: TIER_DEVICE,
    AdapterState.FAILED: TIER_FAILED,
}
# Failures of a load that may be over later.
_PASSING = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED})


class Residency:
    """Lists, prefetches, evicts and pins; a tenant sees and moves its own adapters only."""

    def __init__(self, cache: AdapterCache, sources: AdapterSources, pins: PinRecord) -> None:
        self._cache = cache
        self._sources = sources
        self._pins = pins

    def list(self, tenant: str) -> list[ResidentAdapter]:
        """Return every adapter of a tenant on some tier, being loaded, or failed a moment ago."""
        on_disk = self._cache.on_disk()
        in_memory = {item.digest: item for item in self._cache.residency()}
        own = self._sources.of_tenant(tenant)
        return [
            self._message(source, in_memory.get(digest), on_disk)
            for digest, source in sorted(own.items())
            if digest in in_memory or digest in on_disk
        ]

    async def prefetch(self, source: AdapterSource) -> ResidentAdapter:
        """Load a version as far as the host and return where it is then.

        Raises:
            LorafleetError: its load failed.
        """
        async with self._loaded(source):
            return self._find(source, leases_of_ours=1)

    async def pin(self, source: AdapterSource) -> ResidentAdapter:
        """Load a version, keep it on the device until `unpin`, also after a restart, and return when it is
        there.

        Raises:
            ResourceExhausted: `pin_budget_exceeded`.
            Unavailable: `pin_not_saved` where the disk failed.
            LorafleetError: its load failed.
        """
        async with self._loaded(source):
            was_kept = not self._cache.keep(source.digest)
            try:
                await asyncio.to_thread(self._pins.add, source)
            except OSError as error:
                if not was_kept:
                    self._cache.let_go(source.digest)
                raise _not_saved(error) from error
            while not self._cache.is_on_device(source.digest):  # noqa: ASYNC110 - a thread's doing
                await asyncio.sleep(_POLL_SECONDS)
            return self._find(source, leases_of_ours=1)

    async def unpin(self, source: AdapterSource) -> ResidentAdapter:
        """End a tenant's pin, if there is one, and return where the version is.

        Raises:
            Unavailable: `pin_not_saved` where the disk failed.
        """
        try:
            is_pinned_by_others = await asyncio.to_thread(self._pins.remove, source)
        except OSError as error:
            raise _not_saved(error) from error
        if not is_pinned_by_others:
            self._cache.let_go(source.digest)
        return self._find(source)

    async def restore(self) -> None:
        """Pin again what was pinned before the last restart; wait for a registry that is away."""
        for source in self._pins.sources():
            self._sources.note(source)
        await asyncio.gather(*(self._restore(source) for source in self._pins.sources()))

    async def evict(self, source: AdapterSource) -> None:
        """Drop a version from every tier; harmless where it is on none.

        Raises:
            FailedPrecondition: `adapter_in_use`.
            Unavailable: `adapter_loading` where it is being loaded just now.
        """
        if await asyncio.to_thread(self._cache.evict, source.digest):
            return
        item = self._cache.find(source.digest)
        if item is None or item.state is AdapterState.FAILED:
            return
        if item.leases == 0 and not item.kept:
            raise Unavailable(
                "adapter_loading",
                f"{source.version_ref} is being loaded.",
                resource=f"adapters/{source.version_ref}",
                retry_after_seconds=1.0,
            )
        pinned = ", and it is pinned" if item.kept else ""
        raise FailedPrecondition(
            "adapter_in_use",
            f"{item.leases} requests use {source.version_ref}{pinned}.",
            field="adapter",
            value=item.leases,
            limit=0,
            resource=f"adapters/{source.version_ref}",
        )

    @asynccontextmanager
    async def _loaded(self, source: AdapterSource) -> AsyncIterator[None]:
        """Hold a version on the host for the body's time."""
        lease = self._cache.acquire(source.digest)
        try:
            while not lease.ready:
                if lease.error is not None:
                    raise lease.error
                await asyncio.sleep(_POLL_SECONDS)
            yield
        finally:
            lease.release()

    async def _restore(self, source: AdapterSource) -> None:
        pause_seconds = _RESTORE_PAUSE_SECONDS
        while source in self._pins:
            try:
                async with self._loaded(source):
                    # It may have been unpinned while it was loading.
                    if source in self._pins:
                        self._cache.keep(source.digest)
                return
            except LorafleetError as error:
                detail = {"version": source.version_ref, "tenant": source.tenant, "reason": error.reason}
                _logger.warning("a pinned adapter could not be loaded", extra=detail)
                if error.code not in _PASSING or error.reason == "pin_budget_exceeded":
                    return
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _MAX_RESTORE_PAUSE_SECONDS)

    def _find(self, source: AdapterSource, *, leases_of_ours: int = 0) -> ResidentAdapter:
        message = self._message(source, self._cache.find(source.digest), self._cache.on_disk())
        message.leases = max(0, message.leases - leases_of_ours)
        return message

    def _message(
        self, source: AdapterSource, item: AdapterResidency | None, on_disk: Mapping[str, int]
    ) -> ResidentAdapter:
        message = ResidentAdapter(
            digest=source.digest,
            version_ref=source.version_ref,
            tier=TIER_DISK if source.digest in on_disk else TIER_UNSPECIFIED,
            disk_bytes=on_disk.get(source.digest, 0),
            pinned=source in self._pins,
            max_rank=source.max_rank,
        )
        if item is not None:
            message.tier = _TIERS[item.state]
            message.leases = item.leases
            message.last_use_time.CopyFrom(_timestamp(item.last_use_at))
            if item.state in (AdapterState.HOST, AdapterState.DEVICE):
                message.host_bytes = item.size_bytes
            if item.state is AdapterState.DEVICE:
                message.device_bytes = item.size_bytes
            if item.error is not None:
                message.error_reason = item.error.reason
                message.retry_time.CopyFrom(_timestamp(item.retry_at))
        return message


def _not_saved(error: OSError) -> Unavailable:
    return Unavailable(
        "pin_not_saved",
        f"The record of pins could not be written: {error.strerror or type(error).__name__}.",
        retry_after_seconds=_RESTORE_PAUSE_SECONDS,
    )


def _timestamp(monotonic_seconds: float) -> Timestamp:
    """Return a moment of the monotonic clock as wall time."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns() + int((monotonic_seconds - time.monotonic()) * 1e9))
    return stamp
