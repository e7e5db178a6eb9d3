"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counters since start, and gauges of now.

    Attributes:
        kv_blocks_free: blocks that no sequence holds; those among them that the prefix cache could still find
            are `kv_blocks_cached`.
        prefix_query_tokens: prompt tokens of sequences admitted, of which `prefix_hit_tokens` were found
            computed.
        seconds_per_request: between the ends of requests, of late; None before the first.
    """

    running: int = 0
    waiting: int = 0
    waiting_for_adapter: int = 0
    kv_block_bytes: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    kv_blocks_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    step_seconds: float = 0.0
    seconds_per_request: float | None = None
