"""Keeping requests from a replica that fails."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


class Breaker:
    """Open after `FAILURES_TO_OPEN` failures in a row: no request for a pause, then one as a probe.

    A probe that succeeds closes it; one that fails opens it again for twice as long, up to
    `LONGEST_PAUSE_SECONDS`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._closed_again_at: float | None = None
        self._is_probing = False

    @property
    def is_open(self) -> bool:
        """Whether no request may be sent now."""
        return self._closed_again_at is not None and self._clock() < self._closed_again_at

    def begin(self) -> None:
        """Note that a request is sent; where that is a probe, no other goes with it."""
        if self._closed_again_at is not None and not self.is_open:
            self._is_probing = True
            self._closed_again_at = self._clock() + self._pause_seconds

    def succeed(self) -> bool:
        """Note an answer; return whether that has closed the breaker."""
        was_open = self._closed_again_at is not None
        self._failures, self._pause_seconds = 0, FIRST_PAUSE_SECONDS
        self._closed_again_at, self._is_probing = None, False
        return was_open

    def fail(self) -> bool:
        """Note a failure; return whether that has opened the breaker.

        Requests that were sent before it opened fail too; only a probe makes the pause longer.
        """
        self._failures += 1
        if self._is_probing:
            self._is_probing = False
            self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        elif self._closed_again_at is not None or self._failures < FAILURES_TO_OPEN:
            return False
        opens = self._closed_again_at is None
        self._closed_again_at = self._clock() + self._pause_seconds
        return opens
