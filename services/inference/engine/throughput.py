"""How fast the engine is, as measured: what deadlines and retry hints are judged by."""

from __future__ import annotations

import math

_HALF_LIFE_SECONDS = 10.0
_RATE_KEPT = 0.99


class Throughput:
    """Requests finished per second of late, and the best rates of computing tokens, by size of step."""

    def __init__(self) -> None:
        self._finished = 0.0
        self._observed_seconds = 0.0
        self._last_seconds: float | None = None
        self._tokens_per_second: dict[int, float] = {}

    @property
    def seconds_per_token(self) -> float:
        """Seconds that a token takes in the fastest steps of late; 0 before the first step."""
        return 1 / max(self._tokens_per_second.values()) if self._tokens_per_second else 0.0

    def least_seconds(self, num_tokens: int, max_batch_tokens: int) -> float:
        """Return the least time that computing a prompt of `num_tokens` may take; 0 where none as large has
        been seen. Large steps are the faster ones per token, so only those as large as its own are asked.
        """
        own_size = min(num_tokens, max_batch_tokens).bit_length()
        rates = [rate for size, rate in self._tokens_per_second.items() if size >= own_size]
        return num_tokens / max(rates) if rates else 0.0

    def seconds_per_request(self, now_seconds: float) -> float | None:
        """Return the seconds between one request's end and the next one's; None before any has ended."""
        self._pass_time(now_seconds)
        return self._observed_seconds / self._finished if self._finished else None

    def began(self, now_seconds: float) -> None:
        """Note that work begins after the engine had none; idle time says nothing about speed."""
        self._last_seconds = now_seconds

    def stepped(self, num_tokens: int, step_seconds: float) -> None:
        """Note a step. A best rate slowly fades, so that a machine that got slower is noticed."""
        size = num_tokens.bit_length()
        faded = self._tokens_per_second.get(size, 0.0) * _RATE_KEPT
        self._tokens_per_second[size] = max(faded, num_tokens / max(step_seconds, 1e-6))

    def finished(self, now_seconds: float) -> None:
        """Note that a request has ended."""
        self._pass_time(now_seconds)
        self._finished += 1

    def _pass_time(self, now_seconds: float) -> None:
        if self._last_seconds is not None:
            passed_seconds = max(now_seconds - self._last_seconds, 0.0)
            fade = math.exp2(-passed_seconds / _HALF_LIFE_SECONDS)
            self._finished *= fade
            self._observed_seconds = self._observed_seconds * fade + passed_seconds
        self._last_seconds = now_seconds
