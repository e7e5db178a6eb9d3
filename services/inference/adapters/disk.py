"""The disk tier: fetched adapter folders, named by digest, within a byte budget."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.common.errors import DataLoss, InvalidArgument, ResourceExhausted

_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_MANIFEST = "manifest.json"
_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_TEMPORARY_PREFIX = "fetching-"
_HASH_CHUNK_BYTES = 1 << 20


class Fetcher(Protocol):
    """Where adapters come from. Called on loader threads, so it may block."""

    def fetch(self, digest: str, into: Path) -> None:
        """Write the version's `adapter_config.json` and `adapter_model.safetensors` to the empty folder
        `into`.

        The fetcher checks the bytes against the version's digest. A failure is a `LorafleetError`.
        """


class DiskTier:
    """Adapter folders on disk. Safe to use from several threads.

    Each folder holds the two files of an adapter and a manifest of their SHA-256. A folder that was there at
    start is hashed again before its first use; a damaged one is fetched anew. The least recently used folders
    make room; a folder that is being read stays, so the budget may be exceeded by what the loader threads
    have open at one moment.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._users: dict[str, int] = {}
        self._verified: set[str] = set()
        root.mkdir(parents=True, exist_ok=True)
        self._adopt()

    @property
    def used_bytes(self) -> int:
        """Bytes of all complete folders."""
        with self._lock:
            return sum(self._sizes.values())

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return folder_name(digest) in self._sizes

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every complete folder, by digest."""
        with self._lock:
            return {f"sha256:{name}": size_bytes for name, size_bytes in self._sizes.items()}

    def discard(self, digest: str) -> bool:
        """Remove an adapter's folder; False where it is open or not there."""
        name = folder_name(digest)
        with self._lock:
            if name in self._users or name not in self._sizes:
                return False
            self._remove_locked(name)
            return True

    @contextmanager
    def open(self, digest: str, fetcher: Fetcher) -> Iterator[Path]:
        """Give the adapter's folder, fetched if need be; it is not evicted while it is open.

        The caller opens one digest once at a time.

        Raises:
            LorafleetError: what the fetcher raised; `DataLoss` where the fetched folder is not whole;
                `ResourceExhausted` (`adapter_exceeds_disk`) where it is larger than the whole budget.
        """
        name = folder_name(digest)
        with self._lock:
            self._users[name] = self._users.get(name, 0) + 1
        try:
            if not self._is_whole(name):
                self._fetch(name, digest, fetcher)
            os.utime(self._root / name)
            yield self._root / name
        finally:
            with self._lock:
                self._users[name] -= 1
                if self._users[name] == 0:
                    del self._users[name]

    def _adopt(self) -> None:
        for entry in self._root.iterdir():
            if _DIGEST.fullmatch(entry.name) and (entry / _MANIFEST).is_file():
                self._sizes[entry.name] = _folder_bytes(entry)
            elif entry.name.startswith(_TEMPORARY_PREFIX):
                shutil.rmtree(entry)

    def _is_whole(self, name: str) -> bool:
        with self._lock:
            if name not in self._sizes:
                return False
            if name in self._verified:
                return True
        if _matches_manifest(self._root / name):
            with self._lock:
                self._verified.add(name)
            return True
        with self._lock:
            self._remove_locked(name)
        return False

    def _fetch(self, name: str, digest: str, fetcher: Fetcher) -> None:
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=self._root))
        try:
            fetcher.fetch(digest, temporary)
            _write_manifest(temporary)
            size_bytes = _folder_bytes(temporary)
            self._make_room(size_bytes)
            os.replace(temporary, self._root / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        with self._lock:
            self._sizes[name] = size_bytes
            self._verified.add(name)

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._budget_bytes:
            raise ResourceExhausted(
                "adapter_exceeds_disk",
                f"The adapter takes {size_bytes} bytes on disk; the disk tier has {self._budget_bytes}.",
                value=size_bytes,
                limit=self._budget_bytes,
            )
        with self._lock:
            idle = [name for name in self._sizes if name not in self._users]
            idle.sort(key=lambda name: (self._root / name).stat().st_mtime)
            over_bytes = sum(self._sizes.values()) + size_bytes - self._budget_bytes
            for name in idle:
                if over_bytes <= 0:
                    break
                over_bytes -= self._sizes[name]
                self._remove_locked(name)

    def _remove_locked(self, name: str) -> None:
        # Renamed first: a folder that is half deleted must not be taken for a whole one after a crash.
        self._sizes.pop(name, None)
        self._verified.discard(name)
        trash = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=self._root))
        os.replace(self._root / name, trash / name)
        shutil.rmtree(trash)


def folder_name(digest: str) -> str:
    """Return the 64 hexadecimal digits of `digest`, `sha256:<hex>` or `<hex>`.

    Raises:
        InvalidArgument: `bad_digest`.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise InvalidArgument(
            "bad_digest", "An adapter digest is sha256 and 64 hexadecimal digits.", value=digest
        )
    return match[1]


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _write_manifest(folder: Path) -> None:
    present = sorted(path.name for path in folder.iterdir())
    if present != sorted(_FILES):
        raise DataLoss(
            "adapter_incomplete", f"The fetched adapter has the files {present}.", limit=list(_FILES)
        )
    (folder / _MANIFEST).write_text(
        json.dumps({name: _sha256(folder / name) for name in _FILES}), encoding="utf-8"
    )


def _matches_manifest(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest == {name: _sha256(folder / name) for name in _FILES})
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
