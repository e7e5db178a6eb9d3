"""What the cache counts, for its owner and for the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from services.common import metrics
from services.common.labels import BoundedLabels
from services.inference.adapters.stages import LoadTimes

_stage_seconds = metrics.histogram("lorafleet.inference.adapter.load_stage.duration")
_wait_seconds = metrics.histogram("lorafleet.inference.adapter.wait.duration")
_loads = metrics.counter("lorafleet.inference.adapter.loads")
_evictions = metrics.counter("lorafleet.inference.adapter.evictions")
_requests = metrics.counter("lorafleet.inference.adapter.requests")
_bytes = metrics.up_down_counter("lorafleet.inference.adapter.bytes")

# One series per adapter for so many adapters; the others share one.
_MAX_LABELS = 100


def count_bytes(tier: str, change_bytes: int) -> None:
    """Count bytes that a tier has taken, or given back where `change_bytes` is below 0."""
    _bytes.add(change_bytes, {"tier": tier})


@dataclass(slots=True)
class CacheStats:
    """Counters since start and gauges of now."""

    host_used_bytes: int = 0
    device_used_bytes: int = 0
    disk_used_bytes: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    load_failures: int = 0
    host_evictions: int = 0
    device_evictions: int = 0


class CacheMeasures:
    """Counts what happens in one cache; its lock guards it."""

    def __init__(self) -> None:
        self.stats = CacheStats()
        self._labels = BoundedLabels(_MAX_LABELS)

    def asked(self, digest: str, *, is_hit: bool) -> None:
        """Count a request for an adapter, which is on the host or not."""
        if is_hit:
            self.stats.hits += 1
        else:
            self.stats.misses += 1
        attributes = {"adapter": self._labels.of(digest), "result": "hit" if is_hit else "miss"}
        _requests.add(1, attributes)

    def loaded(self, times: LoadTimes, wait_seconds: float) -> None:
        """Count a load, and how long its first request waited for it."""
        self.stats.loads += 1
        for stage, seconds in times.seconds.items():
            _stage_seconds.record(seconds, {"stage": stage.value})
        _wait_seconds.record(wait_seconds)
        _loads.add(1)

    def failed(self, reason: str) -> None:
        """Count a load that failed."""
        self.stats.load_failures += 1
        _loads.add(1, {"error.type": reason})

    def evicted(self, tier: str) -> None:
        """Count an eviction from the `host` or the `device`."""
        if tier == "host":
            self.stats.host_evictions += 1
        else:
            self.stats.device_evictions += 1
        _evictions.add(1, {"tier": tier})
