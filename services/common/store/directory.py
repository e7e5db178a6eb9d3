"""The object store as a directory: one file per object, written beside and moved into place."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from services.common.failpoints import failpoint
from services.common.store.disk_errors import disk_errors
from services.common.store.interface import (
    STREAM_CHUNK_BYTES,
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectStat,
    checked_key,
    checked_prefix,
)

_TEMPORARY = ".tmp"
_ABANDONED_SECONDS = 24 * 3600


class DirectoryStore:
    """Objects under `root`; several processes of one machine may share it.

    A put writes to `root/.tmp`, syncs, and links or renames, so a crash at any moment leaves the old object,
    the new one or none, and an abandoned temporary file that `ready` removes after a day.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._temporary = root / _TEMPORARY

    @property
    def scratch_dir(self) -> Path:
        """See `ObjectStore.scratch_dir`; what is left there is swept with the rest."""
        return self._temporary

    def ready(self) -> None:
        """Create the folder where it is missing, and sweep abandoned temporary files."""
        with _translated():
            self._temporary.mkdir(parents=True, exist_ok=True)
        self.sweep(older_than_seconds=_ABANDONED_SECONDS)

    def put(self, key: str, data: bytes | Iterable[bytes], *, if_absent: bool = False) -> None:
        """Store `data`; see `ObjectStore.put`."""
        target = self._path(key)
        chunks = (data,) if isinstance(data, bytes) else data
        with _translated():
            self._temporary.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary / secrets.token_hex(16)
            try:
                self._write(temporary, chunks)
                self._make_folders(target.parent)
                failpoint("store.before_visible")
                if if_absent:
                    self._link(temporary, target)
                else:
                    temporary.replace(target)
                failpoint("store.before_sync")
                _sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def put_file(self, key: str, path: Path, *, if_absent: bool = False) -> None:
        """Store the bytes of the file at `path`; see `ObjectStore.put_file`."""
        with path.open("rb") as file:
            self.put(key, _chunks(file), if_absent=if_absent)

    def move_file(self, key: str, path: Path) -> None:
        """Store the file at `path` itself where it lies on the same disk; see `ObjectStore.move_file`."""
        target = self._path(key)
        with _translated():
            self._make_folders(target.parent)
            if path.stat().st_dev == target.parent.stat().st_dev:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                path.replace(target)
                _sync_folder(target.parent)
                return
        self.put_file(key, path)

    def get(self, key: str) -> bytes:
        """Return the bytes of an object; see `ObjectStore.get`."""
        with _translated(key):
            return self._path(key).read_bytes()

    def stream(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield bytes of an object; see `ObjectStore.stream`."""
        with _translated(key), self._path(key).open("rb") as file:
            file.seek(offset)
            yield from _chunks(file, length)

    def stat(self, key: str) -> ObjectStat:
        """Return size and time of an object; see `ObjectStore.stat`."""
        with _translated(key):
            path = self._path(key)
            if not path.is_file():
                raise ObjectNotFoundError(key)
            status = path.stat()
            return ObjectStat(key, status.st_size, status.st_mtime)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectStat]:
        """Yield the objects under `prefix`; see `ObjectStore.list`."""
        folder, _, _ = checked_prefix(prefix).rpartition("/")
        with _translated():
            yield from self._walk(folder + "/" if folder else "", prefix, start_after)

    def delete(self, key: str) -> None:
        """Remove an object; see `ObjectStore.delete`."""
        path = self._path(key)
        with _translated():
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
            _sync_folder(path.parent)

    def sweep(self, *, older_than_seconds: float) -> int:
        """Remove abandoned temporary files; see `ObjectStore.sweep`."""
        num_swept = 0
        oldest = time.time() - older_than_seconds
        with _translated():
            if not self._temporary.is_dir():
                return 0
            for path in self._temporary.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        num_swept += 1
        return num_swept

    def close(self) -> None:
        """Nothing is held open between calls."""

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    def _write(self, path: Path, chunks: Iterable[bytes]) -> None:
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def _link(self, temporary: Path, target: Path) -> None:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise ObjectExistsError(target.relative_to(self._root).as_posix()) from None

    def _make_folders(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectStat]:
        try:
            with os.scandir(self._root / folder) as found:
                entries = [(entry.name + "/" * entry.is_dir(), entry) for entry in found]
        except (FileNotFoundError, NotADirectoryError):
            return
        # With the slash behind folders the order is that of whole keys.
        for name, entry in sorted(entries, key=lambda pair: pair[0].encode()):
            key = folder + name
            if name.startswith(".") or not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if name.endswith("/"):
                if key > start_after or start_after.startswith(key):
                    yield from self._walk(key, prefix, start_after)
            elif key.startswith(prefix) and key > start_after:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield ObjectStat(key, status.st_size, status.st_mtime)


def _chunks(file: BinaryIO, length: int | None = None) -> Iterator[bytes]:
    while length is None or length > 0:
        chunk = file.read(STREAM_CHUNK_BYTES if length is None else min(STREAM_CHUNK_BYTES, length))
        if not chunk:
            return
        if length is not None:
            length -= len(chunk)
        yield chunk


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated(key: str | None = None) -> Iterator[None]:
    with disk_errors("object store"):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if key is None:
                raise
            raise ObjectNotFoundError(key) from error
