"""What every object store offers.

The interface is synchronous, because the S3 client is; services call it through `asyncio.to_thread` at their
edge.

Keys are paths of plain segments (`tenants/acme/files/file-1.json`). No key may be a prefix folder of another:
with `a/b` stored, `a` cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAX_KEY_CHARS = 1024
STREAM_CHUNK_BYTES = 256 * 1024
RETRY_AFTER_SECONDS = 1.0

# A segment never starts with a dot, so neither "..", nor the store's own hidden folders can be reached.
_KEY = re.compile(r"[A-Za-z0-9_@=+-][A-Za-z0-9._@=+-]{0,199}(?:/[A-Za-z0-9_@=+-][A-Za-z0-9._@=+-]{0,199})*")


class ObjectNotFoundError(Exception):
    """No object has this key."""


class ObjectExistsError(Exception):
    """An object has this key, and `if_absent` was asked for."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """One stored object, without its bytes."""

    key: str
    size_bytes: int
    modified_unix_seconds: float


class ObjectStore(Protocol):
    """Objects by key. An object is seen whole or not at all, and a returned `put` is durable.

    Every method may raise `Unavailable` (`store_unavailable`) where the store cannot be reached or refuses to
    work, and the writing ones `ResourceExhausted` (`storage_full`). All methods may be called from several
    threads.
    """

    @property
    def scratch_dir(self) -> Path | None:
        """Where files lie so that `move_file` need not copy them; None where that is nowhere."""
        ...

    def ready(self) -> None:
        """Check that the store can be used, and create its folder or bucket where that is missing."""
        ...

    def put(self, key: str, data: bytes | Iterable[bytes], *, if_absent: bool = False) -> None:
        """Store `data`, in place of what was there.

        With `if_absent`, raises `ObjectExistsError` where the key is taken. Among writers that race for one
        key a directory lets one win; S3 may let several, so it serves keys whose content is given by the key,
        and unique keys.
        """
        ...

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """As `put`, with the bytes of the file at `path`."""
        ...

    def move_file(self, key: str, path: Path) -> None:
        """As `put_file`, but the file at `path` is given away: it may be gone afterwards, and nobody may
        change it."""
        ...

    def get(self, key: str) -> bytes:
        """Return the bytes of a small object. Raises `ObjectNotFoundError`."""
        ...

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield bytes `offset` to `offset + length` (None: to the end) in chunks of at most
        `STREAM_CHUNK_BYTES`.

        Yields nothing from beyond the end. Raises `ObjectNotFoundError` at the first step. A consumer that
        stops early closes the iterator, which gives the connection back.
        """
        ...

    def stat(self, key: str) -> ObjectStat:
        """Return size and time of an object. Raises `ObjectNotFoundError`."""
        ...

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """Yield the objects whose key begins with `prefix` and is above `start_after`, in order of keys."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...

    def sweep(self, *, older_than_seconds: float) -> int:
        """Remove what writers that died half way have left, and return how many such pieces there were."""
        ...

    def close(self) -> None:
        """Give back connections. The store is not used afterwards."""
        ...


def checked_key(key: str) -> str:
    """Return `key` if it is well formed; raise `ValueError` otherwise: keys are never built by callers."""
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key):
        raise ValueError(f"{key[:200]!r} cannot be an object key")
    return key


def checked_prefix(prefix: str) -> str:
    """Return `prefix` if keys can begin with it; raise `ValueError` otherwise."""
    if prefix:
        checked_key(prefix + "x" if prefix.endswith("/") else prefix)
    return prefix
