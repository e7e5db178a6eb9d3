"""The time that records bear, and that uploads expire by."""

from __future__ import annotations

import logging
import time

MAX_STEP_MS = 60_000
_PARTS_PER_STEP = 10

_logger = logging.getLogger("lorafleet.registry")


class Clock:
    """Unix time that follows the system's clock, but never jumps with it.

    Steps up to `MAX_STEP_MS` are taken as they come. A larger one is caught up with at a tenth of the time
    that passes, so that a wrong clock does not make everything expire at once.
    """

    def __init__(self) -> None:
        self._offset_ms = time.time_ns() // 1_000_000 - _monotonic_ms()
        self._read_ms = _monotonic_ms()
        self._is_apart = False

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        monotonic_ms = _monotonic_ms()
        apart_ms = time.time_ns() // 1_000_000 - monotonic_ms - self._offset_ms
        if abs(apart_ms) > MAX_STEP_MS:
            if not self._is_apart:
                _logger.error("the system's clock has jumped", extra={"by_ms": apart_ms})
            most_ms = (monotonic_ms - self._read_ms) // _PARTS_PER_STEP
            self._offset_ms += max(-most_ms, min(most_ms, apart_ms))
            self._is_apart = True
        else:
            self._offset_ms += apart_ms
            self._is_apart = False
        self._read_ms = monotonic_ms
        return monotonic_ms + self._offset_ms


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


_clock = Clock()


def now_ms() -> int:
    """Unix time in milliseconds, as `Clock` has it for this process."""
    return _clock.now_ms()
