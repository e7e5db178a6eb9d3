"""How fast the engine is, as measured: what deadlines and retry hints are judged by."""

from __future__ import annotations

import math

_HALF_LIFE_SECONDS = 10.0
_FASTEST_HALF_LIFE_STEPS = 1000


class Throughput:
    """Finished requests per second of late, and the best rate of computing tokens."""

    def __init__(self) -> None:
        self._finished = 0.0
        self._observed_seconds = 0.0
        self._last_seconds: float | None = None
        self._tokens_per_second = 0.0

    @property
    def seconds_per_token(self) -> float:
        """Seconds that a prompt's token takes in the fastest steps of late; 0 before the first step."""
        return 1 / self._tokens_per_second if self._tokens_per_second else 0.0

    def seconds_per_request(self, now_seconds: float) -> float | None:
        """Return the seconds between one request's end and the next one's; None before any has ended."""
        self._pass_time(now_seconds)
        return self._observed_seconds / self._finished if self._finished else None

    def stepped(self, num_tokens: int, step_seconds: float) -> None:
        """Note a step. The best rate slowly fades, so that a machine that got slower is noticed."""
        self._tokens_per_second *= 0.5 ** (1 / _FASTEST_HALF_LIFE_STEPS)
        self._tokens_per_second = max(self._tokens_per_second, num_tokens / step_seconds)

    def finished(self, now_seconds: float) -> None:
        """Note that a request has ended."""
        self._pass_time(now_seconds)
        self._finished += 1

    def began(self, now_seconds: float) -> None:
        """Note that work begins after the engine had none; idle time says nothing about speed."""
        self._last_seconds = now_seconds

    def _pass_time(self, now_seconds: float) -> None:
        if self._last_seconds is not None:
            passed_seconds = max(now_seconds - self._last_seconds, 0.0)
            fade = math.exp2(-passed_seconds / _HALF_LIFE_SECONDS)
            self._finished *= fade
            self._observed_seconds = self._observed_seconds * fade + passed_seconds
        self._last_seconds = now_seconds
