"""What one request reserves, uses and is counted for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from services.common.errors import LorafleetError
from services.gateway.keys import Principal
from services.gateway.limits import Limiter, Reservation, reserve, settle
from services.gateway.usage import Counts, Line, UsageBook

_logger = logging.getLogger("lorafleet.gateway.metering")

# A token is three bytes or more of most texts; what a reservation misses is settled at the end.
_BYTES_PER_TOKEN = 3
# What is reserved for a completion whose length nobody limited.
OPEN_COMPLETION_TOKENS = 256


@dataclass(slots=True)
class Charge:
    """One request's reservation; settled once, however the request ends."""

    headers: dict[str, str]
    _end: Callable[[Counts, str], None] = field(repr=False)
    _is_settled: bool = False

    def settle(self, counts: Counts, adapter: str) -> None:
        """Count what was used, by the adapter's name (empty: the base), and give the rest back."""
        if not self._is_settled:
            self._is_settled = True
            self._end(counts, adapter)


class Meter:
    """Reserves and counts for one gateway."""

    def __init__(self, limiter: Limiter, book: UsageBook) -> None:
        self._limiter = limiter
        self._book = book
        self._tasks: set[asyncio.Task[None]] = set()

    async def charge(self, principal: Principal, tokens: int) -> Charge:
        """Reserve one request of about `tokens`.

        Raises:
            ResourceExhausted: `rate_limit_exceeded`.
        """
        reservation = await reserve(self._limiter, principal, tokens)

        def end(counts: Counts, adapter: str) -> None:
            counts.requests = 1
            self._book.add(principal.tenant, Line(principal.key_id, adapter), counts)
            # The request may have ended because its client is gone: what is left to do has a task of its own.
            task = asyncio.get_running_loop().create_task(self._settle(reservation, counts))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return Charge(reservation.headers, end)

    async def _settle(self, reservation: Reservation, counts: Counts) -> None:
        try:
            await settle(self._limiter, reservation, counts.prompt_tokens + counts.completion_tokens)
        except LorafleetError as error:
            _logger.warning("a reservation was not settled", extra={"detail": error.message})


def about_tokens(*, text_bytes: int = 0, tokens: int = 0, completions: int = 1, limit: int | None) -> int:
    """Return about how many tokens a request will use.

    Args:
        text_bytes: of the prompts that are texts.
        tokens: of the prompts that are token ids.
        completions: of all prompts together.
        limit: most tokens of one completion; None where that is open.
    """
    longest = OPEN_COMPLETION_TOKENS if limit is None else limit
    return text_bytes // _BYTES_PER_TOKEN + tokens + completions * longest
