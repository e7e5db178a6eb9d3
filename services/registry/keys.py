"""Where each record and each blob lies in the object store.

    bases/<name>/<id>.json
    blobs/sha256/<first two hex>/<hex>
    tenants/<tenant>/adapters/<adapter>/versions/<number>-<id>.json
    tenants/<tenant>/adapters/<adapter>/deletions/<number>-<id>.json
    tenants/<tenant>/adapters/<adapter>/aliases/<alias>/<generation>-<id>.json
    tenants/<tenant>/files/<file id>.json
    tenants/<tenant>/file_deletions/<file id>.json

Every record key holds an id that is never drawn twice, so no write meets another's. Numbers are padded, so
that keys sort by them. Names come here checked (`services.common.names`).
"""

from __future__ import annotations

import re

from services.common.ids import new_id
from services.registry.records import (
    AliasMove,
    BaseRecord,
    FileDeletion,
    FileRecord,
    Record,
    VersionDeletion,
    VersionRecord,
)

BLOBS = "blobs/"
RECORD_PREFIXES = ("bases/", "tenants/")

_VERSION_KEY = re.compile(r"tenants/([^/]+)/adapters/([^/]+)/versions/([0-9]{9})-[^/]+")
_KINDS: tuple[tuple[re.Pattern[str], type[Record]], ...] = (
    (re.compile(r"bases/[^/]+/[^/]+"), BaseRecord),
    (_VERSION_KEY, VersionRecord),
    (re.compile(r"tenants/[^/]+/adapters/[^/]+/deletions/[^/]+"), VersionDeletion),
    (re.compile(r"tenants/[^/]+/adapters/[^/]+/aliases/[^/]+/[^/]+"), AliasMove),
    (re.compile(r"tenants/[^/]+/files/[^/]+"), FileRecord),
    (re.compile(r"tenants/[^/]+/file_deletions/[^/]+"), FileDeletion),
)


def blob_key(digest: str) -> str:
    """The key of the blob with that digest (`sha256:<hex>`)."""
    hexadecimal = digest.removeprefix("sha256:")
    return f"{BLOBS}sha256/{hexadecimal[:2]}/{hexadecimal}"


def digest_of(key: str) -> str:
    """The digest of the blob that lies under `key`."""
    return "sha256:" + key.rpartition("/")[2]


def record_key(record: Record) -> str:
    """A new key for `record`."""
    unique = new_id("r").removeprefix("r-")
    match record:
        case BaseRecord():
            return f"bases/{record.name}/{unique}.json"
        case VersionRecord():
            return f"{_adapter(record)}/versions/{record.version:09d}-{unique}.json"
        case VersionDeletion():
            return f"{_adapter(record)}/deletions/{record.version:09d}-{unique}.json"
        case AliasMove():
            return f"{_adapter(record)}/aliases/{record.alias}/{record.generation:012d}-{unique}.json"
        case FileRecord():
            return f"tenants/{record.tenant}/files/{record.id}.json"
        case FileDeletion():
            return f"tenants/{record.tenant}/file_deletions/{record.id}.json"


def kind_of(key: str) -> type[Record] | None:
    """Which record lies under `key`; None where it is none of ours."""
    return next((kind for pattern, kind in _KINDS if pattern.fullmatch(key)), None)


def version_in(key: str) -> tuple[str, str, int] | None:
    """Tenant, adapter and number of the version whose record lies under `key`, read off the key alone."""
    found = _VERSION_KEY.fullmatch(key)
    return (found[1], found[2], int(found[3])) if found else None


def _adapter(record: VersionRecord | VersionDeletion | AliasMove) -> str:
    return f"tenants/{record.tenant}/adapters/{record.adapter}"
