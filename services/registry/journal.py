"""The truth: append-only records in the object store."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.common.store import ObjectNotFoundError, ObjectStore
from services.registry.keys import RECORD_PREFIXES, kind_of, record_key, version_in
from services.registry.records import CODECS, AliasMove, CorruptRecordError, Event, Record, VersionRecord

_logger = logging.getLogger("lorafleet.registry")

_READERS = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was written down, in the order in which the index takes it.

    Attributes:
        records: by kind (bases, versions, deletions, moves, ...), within a kind by key.
        num_keys: record keys in the store, the unreadable ones among them.
        highest_versions: (tenant, adapter) -> the highest number taken, be its record damaged or not.
        damaged_keys: the keys whose records cannot be read.
    """

    records: tuple[Record, ...]
    num_keys: int
    highest_versions: dict[tuple[str, str], int]
    damaged_keys: tuple[str, ...]


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

    def snapshot(self, *, repair: bool = False) -> Snapshot:
        """Read every record. A damaged one is logged and left out: one lost record must not hide the others.

        Two records can claim one place, a version's number or an alias's generation, where a writer was
        paused while another took over. The writer of the higher epoch has answered its caller, so its record
        holds the place. The other version gets a new number, at the end; the other move did not happen.

        Args:
            repair: write new numbers down; only for the one writer.
        """
        by_kind: dict[type[Record], dict[object, tuple[str, Record]]] = {kind: {} for kind in CODECS}
        numbers: dict[tuple[str, str], int] = {}
        damaged: list[str] = []
        doubles: list[tuple[str, Record]] = []
        keys = list(self._keys())
        for (key, kind), record in zip(keys, self._read_all(keys), strict=True):
            if (version := version_in(key)) is not None:
                tenant, adapter, number = version
                numbers[tenant, adapter] = max(number, numbers.get((tenant, adapter), 0))
            if record is None:
                damaged.append(key)
                continue
            place = _place(record) or key
            rival = by_kind[kind].setdefault(place, (key, record))
            if rival[0] != key:
                _logger.error("two records for one place", extra={"key": key})
                winner, loser = (
                    ((key, record), rival) if _epoch(record) > _epoch(rival[1]) else (rival, (key, record))
                )
                by_kind[kind][place] = winner
                doubles.append(loser)
        for key, record in doubles:
            if isinstance(record, VersionRecord):
                by_kind[VersionRecord][key] = (key, self._renumbered(key, record, numbers, repair))
        records = tuple(record for kind in CODECS for _, record in by_kind[kind].values())
        return Snapshot(records, len(keys), numbers, tuple(damaged))

    def _renumbered(
        self, key: str, record: VersionRecord, numbers: dict[tuple[str, str], int], repair: bool
    ) -> VersionRecord:
        numbers[record.tenant, record.adapter] += 1
        renumbered = dataclasses.replace(record, version=numbers[record.tenant, record.adapter])
        if repair:
            self.append(renumbered)
            self._store.delete(key)
        return renumbered

    def _read_all(self, keys: list[tuple[str, type[Record]]]) -> Iterator[Record | None]:
        with ThreadPoolExecutor(max_workers=_READERS) as pool:
            yield from pool.map(self._read, keys)

    def _read(self, found: tuple[str, type[Record]]) -> Record | None:
        key, kind = found
        try:
            record: Record = CODECS[kind].decode(self._store.get(key))
        except (CorruptRecordError, ObjectNotFoundError) as error:
            _logger.error("corrupt_record", extra={"key": key, "detail": str(error)})
            return None
        return record

    def _keys(self) -> Iterator[tuple[str, type[Record]]]:
        for prefix in RECORD_PREFIXES:
            for found in self._store.list(prefix):
                kind = kind_of(found.key)
                if kind is None:
                    _logger.warning("an object that is not ours", extra={"key": found.key})
                else:
                    yield found.key, kind


def _place(record: Record) -> tuple[str | int, ...] | None:
    """What only one record can have; None where any number may stand side by side."""
    match record:
        case VersionRecord():
            return (record.tenant, record.adapter, record.version)
        case AliasMove():
            return (record.tenant, record.adapter, record.alias, record.generation)
        case _:
            return None


def _epoch(record: Record) -> int:
    return record.epoch if isinstance(record, Event) else 0
