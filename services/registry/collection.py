"""Garbage collection: bytes that nothing names any more, and what broken uploads have left."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from services.common.errors import FailedPrecondition, LorafleetError
from services.common.failpoints import failpoint
from services.common.store import ObjectNotFoundError, ObjectStat, ObjectStore
from services.registry.blobs import Blobs
from services.registry.catalogue import Catalogue
from services.registry.clock import now_ms
from services.registry.journal import Journal, Snapshot
from services.registry.keys import BLOBS, digest_of
from services.registry.leases import Leases
from services.registry.records import FileDeletion, FileRecord, VersionDeletion, VersionRecord
from services.registry.uninterrupted import in_thread
from services.registry.uploads import Uploads

ABANDONED_SECONDS = 24 * 3600.0

_logger = logging.getLogger("lorafleet.registry")


@dataclass(frozen=True, slots=True)
class Collected:
    """What one round removed."""

    num_blobs: int
    blob_bytes: int
    num_uploads: int
    num_abandoned: int


class Collector:
    """Removes blobs that no record names and none has named for a grace period.

    Versions and files that were deleted keep their bytes for the same period, and versions under lease as
    long as the lease lasts. Only the one writer collects, so no other process can be about to name a blob.
    """

    def __init__(
        self, store: ObjectStore, catalogue: Catalogue, blobs: Blobs, leases: Leases, uploads: Uploads
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._blobs = blobs
        self._leases = leases
        self._uploads = uploads

    async def collect(self, grace_seconds: float) -> Collected:
        """Collect once.

        Raises:
            FailedPrecondition: `damaged_records`, with no blob removed: what cannot be read may name any.
            Unavailable: store or index cannot be reached, or another process is the writer.
        """
        await self._catalogue.query()
        num_uploads = await self._uploads.sweep()
        # No grace is so short that it may end a writer at work.
        abandoned_seconds = max(grace_seconds, ABANDONED_SECONDS)
        num_abandoned = await in_thread(self._store.sweep, older_than_seconds=abandoned_seconds)
        with self._blobs.sweeping() as in_use:
            leased = await self._leases.held()
            snapshot = await in_thread(Journal(self._store).snapshot)
            if snapshot.damaged_keys:
                raise FailedPrecondition(
                    "damaged_records",
                    f"{len(snapshot.damaged_keys)} records cannot be read; run verify. Nothing was removed.",
                    resource=snapshot.damaged_keys[0],
                )
            named = _named_digests(snapshot, leased, not_before_ms=now_ms() - int(grace_seconds * 1000))
            candidates = await in_thread(self._unnamed, named, grace_seconds)
            removed = [found for found in candidates if await self._remove(found, in_use)]
        collected = Collected(
            num_blobs=len(removed),
            blob_bytes=sum(found.size_bytes for found in removed),
            num_uploads=num_uploads,
            num_abandoned=num_abandoned,
        )
        _logger.info("garbage collected", extra={"blobs": collected.num_blobs, "bytes": collected.blob_bytes})
        return collected

    async def collect_every(self, interval_seconds: float, grace_seconds: float) -> None:
        """Collect after each pause, for ever. A round that fails is logged, and the next one tries again."""
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                await self.collect(grace_seconds)
            except LorafleetError as error:
                _logger.warning("garbage was not collected", extra={"detail": str(error)})

    def _unnamed(self, named: set[str], grace_seconds: float) -> list[ObjectStat]:
        oldest = time.time() - grace_seconds
        return [
            found
            for found in self._store.list(BLOBS)
            if digest_of(found.key) not in named and found.modified_unix_seconds <= oldest
        ]

    async def _remove(self, found: ObjectStat, in_use: set[str]) -> bool:
        async with self._catalogue.mutation():
            if digest_of(found.key) in in_use:
                return False
            failpoint("gc.before_delete")
            try:
                # Written again since it was listed: a publisher has come and gone.
                fresh = await in_thread(self._store.stat, found.key)
            except ObjectNotFoundError:
                return False
            if fresh.modified_unix_seconds != found.modified_unix_seconds:
                return False
            await in_thread(self._store.delete, found.key)
            failpoint("gc.after_delete")
            return True


def _named_digests(snapshot: Snapshot, leased: frozenset[tuple[str, str]], *, not_before_ms: int) -> set[str]:
    """Return the digests of the blobs that must stay."""
    gone_versions = set()
    gone_files = set()
    for record in snapshot.records:
        match record:
            case VersionDeletion() if record.delete_time_ms <= not_before_ms:
                gone_versions.add((record.tenant, record.adapter, record.version))
            case FileDeletion() if record.delete_time_ms <= not_before_ms:
                gone_files.add((record.tenant, record.id))
    named: set[str] = set()
    for record in snapshot.records:
        match record:
            case VersionRecord():
                is_gone = (record.tenant, record.adapter, record.version) in gone_versions
                if not is_gone or (record.tenant, record.digest) in leased:
                    named.update(file.digest for file in record.files)
            case FileRecord() if (record.tenant, record.id) not in gone_files:
                named.add(record.digest)
    return named
