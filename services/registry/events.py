"""What a watcher of adapters is told, as rows of the index."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.registry.records import AliasMove, Codec, Event, VersionDeletion, VersionRecord


class EventKind(enum.Enum):
    """What happened."""

    VERSION_READY = "version_ready"
    VERSION_DELETED = "version_deleted"
    ALIAS_MOVED = "alias_moved"
    ALIAS_DELETED = "alias_deleted"


@dataclass(frozen=True, slots=True)
class EventRow:
    """One event. `version` is set for events of versions, `move` for those of aliases."""

    sequence: int
    kind: EventKind
    adapter: str
    version: int
    move: AliasMove | None
    time_ms: int

    @classmethod
    def of(cls, record: Event) -> EventRow:
        """The event that `record` tells of."""
        match record:
            case VersionRecord():
                kind, time_ms = EventKind.VERSION_READY, record.create_time_ms
            case VersionDeletion():
                kind, time_ms = EventKind.VERSION_DELETED, record.delete_time_ms
            case AliasMove():
                kind = EventKind.ALIAS_DELETED if record.is_deletion else EventKind.ALIAS_MOVED
                return cls(record.sequence, kind, record.adapter, 0, record, record.time_ms)
        return cls(record.sequence, kind, record.adapter, record.version, None, time_ms)


EVENTS = Codec(EventRow)
