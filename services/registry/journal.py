"""The truth: append-only records in the object store."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from services.common.store import ObjectNotFoundError, ObjectStore
from services.registry.keys import RECORD_PREFIXES, kind_of, record_key, version_in
from services.registry.records import CODECS, CorruptRecordError, Record, VersionRecord

_logger = logging.getLogger("lorafleet.registry")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was written down, in the order in which the index takes it.

    Attributes:
        records: by kind (bases, versions, deletions, moves, ...), within a kind by key.
        num_keys: record keys in the store, the unreadable ones among them.
        highest_versions: (tenant, adapter) -> the highest number taken, be its record damaged or not.
    """

    records: tuple[Record, ...]
    num_keys: int
    highest_versions: dict[tuple[str, str], int]


class Journal:
    """Appends records and reads them all back. Synchronous; the catalogue calls it from a thread."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def append(self, record: Record) -> None:
        """Write `record` under a new key; it is durable on return."""
        self._store.put(record_key(record), CODECS[type(record)].encode(record))

    def count(self) -> int:
        """Return the number of record keys, without reading the records."""
        return sum(1 for _ in self._keys())

    def snapshot(self) -> Snapshot:
        """Read every record. A damaged one is logged and left out: one lost record must not hide the others.

        Two versions under one number can only come from two registries that ran at once. The first keeps it;
        the others are written down again under new numbers, for an acknowledged version is never dropped.
        """
        by_kind: dict[type[Record], list[Record]] = {kind: [] for kind in CODECS}
        numbers = _Numbers()
        doubles: list[tuple[str, VersionRecord]] = []
        num_keys = 0
        for key, kind in self._keys():
            num_keys += 1
            version = version_in(key)
            is_double = version is not None and not numbers.take(*version)
            try:
                record = CODECS[kind].decode(self._store.get(key))
            except (CorruptRecordError, ObjectNotFoundError) as error:
                _logger.error("corrupt_record", extra={"key": key, "detail": str(error)})
                continue
            if is_double:
                doubles.append((key, record))
            else:
                by_kind[kind].append(record)
        by_kind[VersionRecord].extend(self._renumber(key, record, numbers) for key, record in doubles)
        records = tuple(record for kind in CODECS for record in by_kind[kind])
        return Snapshot(records, num_keys, numbers.highest)

    def _renumber(self, key: str, record: VersionRecord, numbers: _Numbers) -> VersionRecord:
        _logger.error("duplicate_version", extra={"key": key, "digest": record.digest})
        version = numbers.highest[record.tenant, record.adapter] + 1
        numbers.take(record.tenant, record.adapter, version)
        renumbered = dataclasses.replace(record, version=version)
        self.append(renumbered)
        self._store.delete(key)
        return renumbered

    def _keys(self) -> Iterator[tuple[str, type[Record]]]:
        for prefix in RECORD_PREFIXES:
            for found in self._store.list(prefix):
                kind = kind_of(found.key)
                if kind is None:
                    _logger.warning("an object that is not ours", extra={"key": found.key})
                else:
                    yield found.key, kind


class _Numbers:
    """The version numbers that are taken, by tenant and adapter."""

    def __init__(self) -> None:
        self._taken: set[tuple[str, str, int]] = set()
        self.highest: dict[tuple[str, str], int] = {}

    def take(self, tenant: str, adapter: str, version: int) -> bool:
        """Take a number; return False where it was taken before."""
        if (tenant, adapter, version) in self._taken:
            return False
        self._taken.add((tenant, adapter, version))
        self.highest[tenant, adapter] = max(version, self.highest.get((tenant, adapter), 0))
        return True
