"""The journal and the index together: reads that survive a lost index, writes that are durable first.

One registry process at a time serves a store (`services.registry.writer`), so it knows how many records there
are: an index that was emptied, rolled back or half filled is noticed at the next read, and rebuilt before
that read is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from services.common.errors import Unavailable
from services.common.failpoints import failpoint
from services.common.store import ObjectStore
from services.registry.index import Command, Index, commands_for, highest_version_command
from services.registry.journal import Journal
from services.registry.read_cache import ReadCache
from services.registry.records import (
    AliasMove,
    BaseRecord,
    Event,
    FileDeletion,
    FileRecord,
    Record,
    VersionDeletion,
    VersionRecord,
)
from services.registry.uninterrupted import to_the_end
from services.registry.writer import Writer

_logger = logging.getLogger("lorafleet.registry")

_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5

# What the failpoints around the writing of each record are called by.
_PLACES: dict[type[Record], str] = {
    BaseRecord: "base",
    VersionRecord: "publish",
    VersionDeletion: "delete",
    AliasMove: "alias",
    FileRecord: "file",
    FileDeletion: "file_delete",
}


class Catalogue:
    """What is registered. `query` reads; `mutation` reads and appends, one at a time."""

    def __init__(self, store: ObjectStore, index: Index, writer: Writer) -> None:
        self._journal = Journal(store)
        self._index = index
        self._writer = writer
        self._epoch: int | None = None
        self._changed = asyncio.Event()
        self._lock = asyncio.Lock()
        self._num_records: int | None = None
        self._cache = ReadCache()
        self._return: asyncio.Task[None] | None = None

    async def rebuild(self) -> int:
        """Rebuild the index from the store; return the number of records."""
        async with self._lock:
            await self._hold()
            return await self._rebuild_locked()

    async def query(self, *commands: Command) -> list[Any]:
        """Run reads as one transaction on an index that holds every record.

        While the index is away, what was asked before is answered as before: nothing can have been written.

        Raises:
            Unavailable: store or index cannot be reached, or another process serves this store.
        """
        if self._return is not None and (known := await self._remembered(commands)) is not None:
            return known
        try:
            return await self._fresh(commands)
        except Unavailable as error:
            if error.reason != "store_unavailable" or (known := await self._remembered(commands)) is None:
                raise
            self._return = self._return or asyncio.create_task(self._wait_for_index())
            return known

    async def _fresh(self, commands: tuple[Command, ...]) -> list[Any]:
        self._note(await self._writer.hold_for_reading())
        held, answers = await self._index.query(commands)
        if self._is_current(held):
            self._cache.keep(commands, answers)
            return answers
        # A write may be under way: with the lock it is finished, and the second look decides. A rebuild goes
        # on although the caller's time ran out, for the next caller needs it too.
        return await to_the_end(self._query_alone(commands))

    @asynccontextmanager
    async def mutation(self) -> AsyncIterator[Mutation]:
        """Hold the registry for reads and writes that belong together."""
        async with self._lock:
            await self._hold()
            yield Mutation(self)

    async def position(self) -> int:
        """Return the sequence of the last record."""
        await self.query()
        async with self._lock:
            if self._num_records is None:
                await self._check_locked()
            assert self._num_records is not None
            return self._num_records

    def next_change(self) -> asyncio.Event:
        """The event that is set when the next record was added. Ask for it before reading."""
        return self._changed

    async def close(self) -> None:
        """Let the next process write, and close the index's connections."""
        if self._return is not None:
            self._return.cancel()
            await asyncio.wait([self._return])
        try:
            await self._writer.release()
        finally:
            await self._index.close()

    async def _hold(self) -> None:
        self._note(await self._writer.hold())

    def _note(self, epoch: int) -> None:
        if epoch != self._epoch:
            # Another process may have written in between.
            self._epoch, self._num_records = epoch, None
            self._cache.clear()

    async def _remembered(self, commands: tuple[Command, ...]) -> list[Any] | None:
        known = self._cache.find(commands)
        if known is not None:
            await self._writer.check_not_superseded()
        return known

    async def _wait_for_index(self) -> None:
        """Return when the index answers again; meanwhile no read waits for it that memory can answer."""
        _logger.warning("the index is away; reads are answered from memory")
        try:
            while True:
                await asyncio.sleep(_PAUSE_SECONDS)
                with contextlib.suppress(Unavailable):
                    await self._index.num_records()
                    return
        finally:
            self._return = None
            _logger.info("the index is asked again")

    def _tell_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

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
        await self._hold()
        if self._num_records is None:
            await self._check_locked()
        assert self._num_records is not None
        record = self._marked(record, self._num_records + 1)
        self._cache.overwritten(commands_for(record))
        place = _PLACES[type(record)]
        failpoint(f"{place}.before_record")
        before, self._num_records = self._num_records, None
        # While the number is unknown a failure on the way makes the next read compare store and index.
        await asyncio.to_thread(self._journal.append, record)
        failpoint(f"{place}.after_record")
        if await self._index.commit(record, num_records_before=before, writer=self._writer.token):
            self._num_records = before + 1
        else:
            await self._rebuild_locked()
        failpoint(f"{place}.after_index")
        self._tell_watchers()

    def _marked(self, record: Record, sequence: int) -> Record:
        assert self._epoch is not None
        if isinstance(record, Event):
            return dataclasses.replace(record, sequence=sequence, epoch=self._epoch)
        return record

    async def _check_locked(self) -> None:
        num_records = await asyncio.to_thread(self._journal.count)
        if await self._index.num_records() == num_records:
            self._num_records = num_records
        else:
            await self._rebuild_locked()

    async def _rebuild_locked(self) -> int:
        self._num_records = None
        self._cache.clear()
        for _ in range(_ATTEMPTS):
            snapshot = await asyncio.to_thread(self._journal.snapshot, repair=True)
            numbers = [
                highest_version_command(tenant, adapter, version)
                for (tenant, adapter), version in snapshot.highest_versions.items()
            ]
            if await self._index.replace(snapshot.records, extra=numbers, num_records=snapshot.num_keys):
                self._num_records = snapshot.num_keys
                _logger.info("index rebuilt", extra={"records": snapshot.num_keys})
                self._tell_watchers()
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
