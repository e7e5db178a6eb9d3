"""What the engine's counters and gauges say, as metrics; written once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from opentelemetry.metrics import Counter, UpDownCounter

from services.common import metrics
from services.inference.engine.stats import EngineStats

_INTERVAL_SECONDS = 1.0

_running = metrics.up_down_counter("lorafleet.inference.sequences.running")
_waiting = metrics.up_down_counter("lorafleet.inference.sequences.waiting")
_kv_used = metrics.up_down_counter("lorafleet.inference.kv.used")
_kv_cached = metrics.up_down_counter("lorafleet.inference.kv.cached")
_kv_total = metrics.up_down_counter("lorafleet.inference.kv.total")
_prefix_tokens = metrics.counter("lorafleet.inference.prefix_cache.tokens")
_tokens = metrics.counter("lorafleet.inference.tokens")
_preemptions = metrics.counter("lorafleet.inference.preemptions")
_steps = metrics.counter("lorafleet.inference.steps")


class EngineMeters:
    """Adds to each instrument what a value has changed by since it was last looked at."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self._told: dict[tuple[str, str], int] = {}

    async def run(self) -> None:
        """Look once a second; at the end the gauges are taken back."""
        try:
            while True:
                self.observe(self._stats())
                await asyncio.sleep(_INTERVAL_SECONDS)
        finally:
            self.observe(_without_gauges(self._stats()))

    def observe(self, stats: EngineStats) -> None:
        """Tell what `stats` says."""
        block = stats.kv_block_bytes
        self._tell(_running, stats.running)
        self._tell(_waiting, stats.waiting - stats.waiting_for_adapter, {"for": "place"})
        self._tell(_waiting, stats.waiting_for_adapter, {"for": "adapter"})
        self._tell(_kv_used, (stats.kv_blocks_total - stats.kv_blocks_free) * block)
        self._tell(_kv_cached, stats.kv_blocks_cached * block)
        self._tell(_kv_total, stats.kv_blocks_total * block)
        self._tell(_prefix_tokens, stats.prefix_hit_tokens, {"result": "hit"})
        self._tell(_prefix_tokens, stats.prefix_query_tokens - stats.prefix_hit_tokens, {"result": "miss"})
        self._tell(_tokens, stats.prompt_tokens, {"kind": "prompt"})
        self._tell(_tokens, stats.completion_tokens, {"kind": "completion"})
        self._tell(_preemptions, stats.preemptions)
        self._tell(_steps, stats.steps)

    def _tell(
        self, instrument: Counter | UpDownCounter, value: int, attributes: Mapping[str, str] | None = None
    ) -> None:
        series = (str(id(instrument)), str(attributes))
        change = value - self._told.get(series, 0)
        if change:
            instrument.add(change, attributes)
            self._told[series] = value


def _without_gauges(stats: EngineStats) -> EngineStats:
    """Return the counters alone: an engine that has ended holds nothing."""
    return EngineStats(
        steps=stats.steps,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        preemptions=stats.preemptions,
        prefix_query_tokens=stats.prefix_query_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
    )
