"""Bytes by their digest: received to a scratch file, stored once, checked whenever they are read."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.errors import DataLoss, OutOfRange, ResourceExhausted
from services.common.failpoints import failpoint
from services.common.store import ObjectNotFoundError, ObjectStore
from services.registry.keys import blob_key
from services.registry.uninterrupted import Threads

Piece = tuple[int, bytes]


class Upload:
    """Bytes on their way in: written to `path` and hashed as they come."""

    def __init__(self, path: Path, *, max_bytes: int, field: str) -> None:
        self.path = path
        self.size_bytes = 0
        self._max_bytes = max_bytes
        self._field = field
        self._hash = hashlib.sha256()
        # Unbuffered: chunks are large, and a full disk is then met in `write`, never in `close`.
        self._file = path.open("xb", buffering=0)

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of what came so far."""
        return "sha256:" + self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append `data`; beyond the limit nothing is kept. Raises `ResourceExhausted` (`too_large`)."""
        if self.size_bytes + len(data) > self._max_bytes:
            raise too_large(self._field, self.size_bytes + len(data), self._max_bytes)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self.size_bytes += len(data)

    def close(self) -> None:
        """Close the file, which stays where it is."""
        self._file.close()


class Blobs:
    """The blobs of the object store; `threads` do the reading and writing."""

    def __init__(self, store: ObjectStore, threads: Threads) -> None:
        self._store = store
        self._threads = threads
        self._in_use: Counter[str] = Counter()
        self._used_since_sweep: set[str] | None = None

    async def keep(self, digest: str, path: Path) -> None:
        """Store the bytes of `path`, whose digest is `digest`; durable on return, equal bytes kept once.

        Bytes that are there already are written again: that heals a damaged copy, and costs what reading it
        would. The file at `path` is given away.
        """
        failpoint("blob.before_put")
        await self._threads.run(self._store.move_file, blob_key(digest), path)
        failpoint("blob.after_put")

    @contextmanager
    def in_use(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep garbage collection away from blobs that a record under way is going to name."""
        held = list(digests)
        self._in_use.update(held)
        if self._used_since_sweep is not None:
            self._used_since_sweep.update(held)
        try:
            yield
        finally:
            self._in_use.subtract(held)

    @contextmanager
    def sweeping(self) -> Iterator[set[str]]:
        """Yield the digests that are in use or come into use until the end: a set that grows."""
        used = {digest for digest, count in self._in_use.items() if count > 0}
        self._used_since_sweep = used
        try:
            yield used
        finally:
            self._used_since_sweep = None
            self._in_use += Counter()

    async def stream(
        self, digest: str, *, size_bytes: int, offset: int, length: int | None
    ) -> AsyncGenerator[Piece, None]:
        """Yield (offset, bytes) from `offset` on; the last piece only once the whole blob proved to be
        intact.

        Args:
            digest, size_bytes: which blob, and its size as recorded.
            offset: first byte wanted.
            length: bytes wanted; None means to the end, and more than there is means to the end too.

        Raises:
            OutOfRange: `bad_range`.
            DataLoss: `corrupt_blob`.
        """
        if offset > size_bytes:
            message = f"The file has {size_bytes} bytes; offset {offset} lies beyond its end."
            raise OutOfRange("bad_range", message, field="offset", value=offset, limit=size_bytes)
        end = size_bytes if length is None else min(size_bytes, offset + length)
        pieces = self._checked_pieces(digest, size_bytes, offset, end)
        ahead = self._read(pieces)
        try:
            while (piece := await ahead) is not None:
                # One piece is read and hashed while the one before is sent.
                ahead = self._read(pieces)
                yield piece
        finally:
            await asyncio.wait([ahead])
            if not ahead.cancelled():
                # A failure nobody waits for any more; asking keeps asyncio from reporting it as forgotten.
                ahead.exception()
            await self._threads.run(pieces.close)

    def _read(self, pieces: Generator[Piece, None, None]) -> asyncio.Task[Piece | None]:
        return asyncio.create_task(self._threads.run(next, pieces, None))

    def _checked_pieces(
        self, digest: str, size_bytes: int, offset: int, end: int
    ) -> Generator[Piece, None, None]:
        found = hashlib.sha256()
        position = 0
        held: Piece | None = None
        try:
            for chunk in self._store.stream(blob_key(digest)):
                found.update(chunk)
                start, stop = max(offset, position), min(end, position + len(chunk))
                if start < stop:
                    if held is not None:
                        yield held
                    held = (start, chunk[start - position : stop - position])
                position += len(chunk)
        except ObjectNotFoundError as error:
            raise _corrupt(digest) from error
        if position != size_bytes or "sha256:" + found.hexdigest() != digest:
            raise _corrupt(digest)
        if held is not None:
            yield held


def too_large(field: str, size_bytes: int, limit_bytes: int) -> ResourceExhausted:
    """The error for bytes beyond a limit."""
    return ResourceExhausted(
        "too_large",
        f"{field} has at least {size_bytes} bytes; the limit is {limit_bytes}.",
        field=field,
        value=size_bytes,
        limit=limit_bytes,
        final=True,
    )


def _corrupt(digest: str) -> DataLoss:
    message = "The stored bytes do not match their digest."
    return DataLoss("corrupt_blob", message, resource=digest, final=True)
