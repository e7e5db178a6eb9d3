"""Waiting for a registry or store that does not answer just now."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.common.errors import DeadlineExceeded, LorafleetError, Unavailable

_logger = logging.getLogger("lorafleet.trainer.patience")

PATIENCE_SECONDS = 900.0
MAX_PAUSE_SECONDS = 5.0
_CHECK_SECONDS = 0.2

ResultT = TypeVar("ResultT")


class Patience:
    """Does something again while its failure says that this may help, for `PATIENCE_SECONDS` in all.

    Only for what may be done twice.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        """Call `check` while waiting; it raises to give up."""
        self._check = check

    async def call(self, attempt: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Return what `attempt` returns; its last error passes through."""
        waiting = _Waiting()
        while True:
            try:
                return await attempt()
            except (Unavailable, DeadlineExceeded) as error:
                for pause in waiting.pauses(error):
                    self._check()
                    await asyncio.sleep(pause)

    def do(self, attempt: Callable[[], ResultT]) -> ResultT:
        """As `call`, for what blocks."""
        waiting = _Waiting()
        while True:
            try:
                return attempt()
            except (Unavailable, DeadlineExceeded) as error:
                for pause in waiting.pauses(error):
                    self._check()
                    time.sleep(pause)


class _Waiting:
    """The pauses between attempts: growing, and cut so small that a cancel is heard."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + PATIENCE_SECONDS
        self._pause_seconds = _CHECK_SECONDS

    def pauses(self, error: LorafleetError) -> list[float]:
        """Return the seconds to sleep, in pieces; raise `error` where the time is up."""
        if time.monotonic() > self._deadline:
            raise error
        _logger.warning("waiting", extra={"reason": error.reason, "detail": error.message})
        pieces = max(1, round(self._pause_seconds / _CHECK_SECONDS))
        self._pause_seconds = min(MAX_PAUSE_SECONDS, self._pause_seconds * 2)
        return [_CHECK_SECONDS] * pieces
