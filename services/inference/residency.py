"""Adapters in memory, as an operator sees and moves them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.inference.v1.inference_service_pb2 import (
    TIER_DEVICE,
    TIER_DISK,
    TIER_FAILED,
    TIER_HOST,
    TIER_LOADING,
    ResidentAdapter,
)
from services.common.errors import FailedPrecondition, Unavailable
from services.inference.adapters.cache import AdapterCache, AdapterResidency, AdapterState
from services.inference.sources import AdapterSource, AdapterSources

_POLL_SECONDS = 0.02
_TIERS = {
    AdapterState.FETCHING: TIER_LOADING,
    AdapterState.HOST: TIER_HOST,
    AdapterState.DEVICE: TIER_DEVICE,
    AdapterState.FAILED: TIER_FAILED,
}


class Residency:
    """Lists, prefetches and evicts."""

    def __init__(self, cache: AdapterCache, sources: AdapterSources) -> None:
        self._cache = cache
        self._sources = sources

    def list(self) -> list[ResidentAdapter]:
        """Return every adapter on some tier, being loaded, or failed a moment ago."""
        on_disk = self._cache.on_disk()
        in_memory = [self._message(item, on_disk) for item in self._cache.residency()]
        only_on_disk = on_disk.keys() - {message.digest for message in in_memory}
        return in_memory + [
            ResidentAdapter(
                digest=digest,
                version_ref=self._version_ref(digest),
                tier=TIER_DISK,
                disk_bytes=on_disk[digest],
                max_rank=self._max_rank(digest),
            )
            for digest in sorted(only_on_disk)
        ]

    async def prefetch(self, source: AdapterSource) -> ResidentAdapter:
        """Load a version as far as the host and return where it is then.

        Raises:
            LorafleetError: its load failed.
        """
        lease = self._cache.acquire(source.digest)
        try:
            while not lease.ready:
                if lease.error is not None:
                    raise lease.error
                await asyncio.sleep(_POLL_SECONDS)
            item = self._find(source.digest)
            assert item is not None, "a leased adapter stays where it is"
            return self._message(item, self._cache.on_disk(), leases_of_ours=1)
        finally:
            lease.release()

    async def evict(self, source: AdapterSource) -> None:
        """Drop a version from every tier; harmless where it is on none.

        Raises:
            FailedPrecondition: `adapter_in_use`.
            Unavailable: `adapter_loading` where it is being loaded just now.
        """
        if await asyncio.to_thread(self._cache.evict, source.digest):
            return
        item = self._find(source.digest)
        if item is None or item.state is AdapterState.FAILED:
            return
        if item.leases == 0:
            raise Unavailable(
                "adapter_loading",
                f"{source.version_ref} is being loaded.",
                resource=f"adapters/{source.version_ref}",
                retry_after_seconds=1.0,
            )
        raise FailedPrecondition(
            "adapter_in_use",
            f"{item.leases} requests use {source.version_ref}.",
            field="adapter",
            value=item.leases,
            limit=0,
            resource=f"adapters/{source.version_ref}",
        )

    def _find(self, digest: str) -> AdapterResidency | None:
        return next((item for item in self._cache.residency() if item.digest == digest), None)

    def _message(
        self, item: AdapterResidency, on_disk: Mapping[str, int], *, leases_of_ours: int = 0
    ) -> ResidentAdapter:
        on_host = item.state in (AdapterState.HOST, AdapterState.DEVICE)
        return ResidentAdapter(
            digest=item.digest,
            version_ref=self._version_ref(item.digest),
            tier=_TIERS[item.state],
            device_bytes=item.size_bytes if item.state is AdapterState.DEVICE else 0,
            host_bytes=item.size_bytes if on_host else 0,
            disk_bytes=on_disk.get(item.digest, 0),
            leases=item.leases - leases_of_ours,
            last_use_time=_timestamp(item.last_use_at),
            max_rank=self._max_rank(item.digest),
            error_reason="" if item.error is None else item.error.reason,
            retry_time=None if item.error is None else _timestamp(item.retry_at),
        )

    def _version_ref(self, digest: str) -> str:
        """Return `name:3`; empty for a version on disk that nobody has asked for since the start."""
        source = self._sources.get(digest)
        return "" if source is None else source.version_ref

    def _max_rank(self, digest: str) -> int:
        source = self._sources.get(digest)
        return 0 if source is None else source.max_rank


def _timestamp(monotonic_seconds: float) -> Timestamp:
    """Return a moment of the monotonic clock as wall time."""
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns() + int((monotonic_seconds - time.monotonic()) * 1e9))
    return stamp
