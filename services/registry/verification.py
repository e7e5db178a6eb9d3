"""Verification: every record read, every named blob hashed again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from services.common.store import ObjectNotFoundError, ObjectStore
from services.registry.journal import Journal
from services.registry.keys import blob_key
from services.registry.records import FileDeletion, FileRecord, VersionDeletion, VersionRecord


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it was written: `corrupt_record`, `corrupt_blob` or `missing_blob`."""

    reason: str
    key: str
    named_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read, and what of it is damaged."""

    num_records: int
    num_blobs: int
    blob_bytes: int
    damages: tuple[Damage, ...]


def verify(store: ObjectStore) -> Verification:
    """Read everything that is named and not deleted, and change nothing; a registry may run meanwhile.

    Raises:
        Unavailable: the store cannot be reached.
    """
    snapshot = Journal(store).snapshot()
    damages = [Damage("corrupt_record", key, ()) for key in snapshot.damaged_keys]
    named: dict[str, list[str]] = {}
    deleted = {
        _identity(found) for found in snapshot.records if isinstance(found, VersionDeletion | FileDeletion)
    }
    for record in snapshot.records:
        for name, digest in _blobs_of(record):
            if _identity(record) not in deleted:
                named.setdefault(digest, []).append(name)
    blob_bytes = 0
    for digest, names in named.items():
        found_digest, size_bytes = _hashed(store, blob_key(digest))
        blob_bytes += size_bytes
        if found_digest != digest:
            reason = "corrupt_blob" if found_digest else "missing_blob"
            damages.append(Damage(reason, blob_key(digest), tuple(names)))
    return Verification(snapshot.num_keys, len(named), blob_bytes, tuple(damages))


def _blobs_of(record: object) -> Iterator[tuple[str, str]]:
    match record:
        case VersionRecord():
            for file in record.files:
                yield f"{record.tenant}/{record.adapter}:{record.version}/{file.name}", file.digest
        case FileRecord():
            yield f"{record.tenant}/{record.id}", record.digest


def _identity(record: object) -> tuple[str, str, int]:
    match record:
        case VersionRecord() | VersionDeletion():
            return (record.tenant, record.adapter, record.version)
        case FileRecord() | FileDeletion():
            return (record.tenant, record.id, 0)
        case _:
            return ("", "", 0)


def _hashed(store: ObjectStore, key: str) -> tuple[str, int]:
    """Return digest and size of an object; an empty digest where there is none."""
    found = hashlib.sha256()
    size_bytes = 0
    try:
        for chunk in store.stream(key):
            found.update(chunk)
            size_bytes += len(chunk)
    except ObjectNotFoundError:
        return "", 0
    return "sha256:" + found.hexdigest(), size_bytes
