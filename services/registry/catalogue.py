"""The journal and the index together: reads that survive a lost index, writes that are durable first.

One registry runs per fleet, and it is the only writer. It knows how many records there are, so an index that
was emptied, rolled back or half filled is noticed at the next read, and rebuilt before that read is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from services.common.errors import Unavailable
from services.common.store import ObjectStore
from services.registry.index import Command, Index, highest_version_command
from services.registry.journal import Journal
from services.registry.records import Record
from services.registry.uninterrupted import to_the_end

_logger = logging.getLogger("lorafleet.registry")

_ATTEMPTS = 3


class Catalogue:
    """What is registered. `query` reads; `mutation` reads and appends, one at a time."""

    def __init__(self, store: ObjectStore, index: Index) -> None:
        self._journal = Journal(store)
        self._index = index
        self._lock = asyncio.Lock()
        self._num_records: int | None = None

    async def rebuild(self) -> int:
        """Rebuild the index from the store; return the number of records."""
        async with self._lock:
            return await self._rebuild_locked()

    async def query(self, *commands: Command) -> list[Any]:
        """Run reads as one transaction on an index that holds every record.

        Raises:
            Unavailable: store or index cannot be reached.
        """
        held, answers = await self._index.query(commands)
        if self._is_current(held):
            return answers
        # A write may be under way: with the lock it is finished, and the second look decides. A rebuild goes
        # on although the caller's time ran out, for the next caller needs it too.
        return await to_the_end(self._query_alone(commands))

    @asynccontextmanager
    async def mutation(self) -> AsyncIterator[Mutation]:
        """Hold the registry for reads and writes that belong together."""
        async with self._lock:
            yield Mutation(self)

    async def close(self) -> None:
        """Close the index's connections."""
        await self._index.close()

    def _is_current(self, held: int | None) -> bool:
        return self._num_records is not None and held == self._num_records

    async def _query_alone(self, commands: tuple[Command, ...]) -> list[Any]:
        async with self._lock:
            return await self._query_locked(commands)

    async def _query_locked(self, commands: tuple[Command, ...]) -> list[Any]:
        for _ in range(_ATTEMPTS):
            held, answers = await self._index.query(commands)
            if self._is_current(held):
                return answers
            await self._check_locked()
        raise _unstable()

    async def _append_locked(self, record: Record) -> None:
        if self._num_records is None:
            await self._check_locked()
        before, self._num_records = self._num_records, None
        # While the number is unknown a failure on the way makes the next read compare store and index.
        await asyncio.to_thread(self._journal.append, record)
        assert before is not None
        if await self._index.commit(record, num_records_before=before):
            self._num_records = before + 1
        else:
            await self._rebuild_locked()

    async def _check_locked(self) -> None:
        num_records = await asyncio.to_thread(self._journal.count)
        if await self._index.num_records() == num_records:
            self._num_records = num_records
        else:
            await self._rebuild_locked()

    async def _rebuild_locked(self) -> int:
        self._num_records = None
        for _ in range(_ATTEMPTS):
            snapshot = await asyncio.to_thread(self._journal.snapshot)
            numbers = [
                highest_version_command(tenant, adapter, version)
                for (tenant, adapter), version in snapshot.highest_versions.items()
            ]
            if await self._index.replace(snapshot.records, extra=numbers, num_records=snapshot.num_keys):
                self._num_records = snapshot.num_keys
                _logger.info("index rebuilt", extra={"records": snapshot.num_keys})
                return snapshot.num_keys
        raise _unstable()


class Mutation:
    """The registry, held by one writer."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def query(self, *commands: Command) -> list[Any]:
        """As `Catalogue.query`; nothing is written by others until the mutation ends."""
        return await self._catalogue._query_locked(commands)

    async def append(self, record: Record) -> None:
        """Write `record` down for good, then into the index; a cancelled caller does not cut this short."""
        await to_the_end(self._catalogue._append_locked(record))


def _unstable() -> Unavailable:
    return Unavailable(
        "store_unavailable", "The index is being emptied while it is rebuilt.", retry_after_seconds=1.0
    )
