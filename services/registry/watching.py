"""Watching: what became ready, moved or was retired, in order and without a gap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from services.common.errors import InvalidArgument, Unavailable
from services.registry.catalogue import Catalogue
from services.registry.events import EVENTS, EventRow
from services.registry.index import tenant_key
from services.registry.lookup import Lookup, Version

_BATCH = 100


@dataclass(frozen=True, slots=True)
class WatchedEvent:
    """One event; `version`, for events of versions, as it stands when it is told."""

    row: EventRow
    version: Version | None


class Watching:
    """The events of all tenants; each watch sees those of one."""

    def __init__(self, catalogue: Catalogue, lookup: Lookup) -> None:
        self._catalogue = catalogue
        self._lookup = lookup
        self._draining = asyncio.Event()

    async def start(self, resume_after: int | None) -> int:
        """Return the position from which a watch goes on; None begins with what comes next.

        Raises:
            InvalidArgument: `bad_resume_token`, for a position that was never reached.
        """
        position = await self._catalogue.position()
        if resume_after is None:
            return position
        if resume_after > position:
            message = "resume_token is ahead of everything that happened here."
            raise InvalidArgument("bad_resume_token", message, field="resume_token")
        return resume_after

    async def events(self, tenant: str, after: int) -> AsyncGenerator[WatchedEvent, None]:
        """Yield the tenant's events after a position, those to come too, until `drain`.

        Raises:
            Unavailable: `draining`; watch again, elsewhere or later, from the last token.
        """
        while True:
            # Asked for before the events are read, so that none slips in between.
            change = self._catalogue.next_change()
            [found] = await self._catalogue.query(
                ("ZRANGEBYSCORE", tenant_key(tenant, "events"), f"({after}", "+inf", "LIMIT", 0, _BATCH)
            )
            for row in map(EVENTS.decode, found):
                version = None
                if row.move is None:
                    version = await self._lookup.version(self._catalogue, tenant, row.adapter, row.version)
                yield WatchedEvent(row, version)
                after = row.sequence
            if not found:
                await self._either(change)

    async def drain(self) -> None:
        """End every watch."""
        self._draining.set()

    async def _either(self, change: asyncio.Event) -> None:
        waits = [asyncio.create_task(change.wait()), asyncio.create_task(self._draining.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._draining.is_set():
            raise Unavailable("draining", "This registry is shutting down.")
