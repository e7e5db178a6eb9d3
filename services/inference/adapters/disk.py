"""The disk tier: fetched adapter folders, named by digest, within a byte budget."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.common.errors import DataLoss, InvalidArgument, ResourceExhausted
from services.common.failpoints import failpoint
from services.inference.adapters.measures import count_bytes
from services.inference.adapters.stages import LoadTimes, Stage

_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_MANIFEST = "manifest.json"
_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_TEMPORARY_PREFIX = "fetching-"
_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetcher knows of the files it has written.

    Attributes:
        digests: SHA-256 of each file, in hexadecimal digits, computed from the bytes as they came.
        verify_seconds: how much of the time that took.
        origin: what the fetcher wants to be told again after a restart (`DiskTier.origins`).
    """

    digests: Mapping[str, str]
    verify_seconds: float = 0.0
    origin: str = ""


class Fetcher(Protocol):
    """Where adapters come from. Called on loader threads, so it may block."""

    def fetch(self, digest: str, into: Path) -> Fetched | None:
        """Write the version's `adapter_config.json` and `adapter_model.safetensors` to the empty folder
        `into`.

        The fetcher checks the bytes against the version's digest. A failure is a `LorafleetError`. What it
        has not hashed, where it returns None, the disk tier hashes.
        """


class DiskTier:
    """Adapter folders on disk. Safe to use from several threads.

    Each folder holds the two files of an adapter and a manifest of their SHA-256. Before a folder is used,
    its files are hashed, unless this process has hashed these very files (by size and time of change) before;
    a damaged folder is fetched anew. The least recently used folders make room; a folder that is being read
    stays, so the budget may be exceeded by what the loader threads have open at one moment.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        # The least recently used first.
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used_bytes = 0
        self._users: dict[str, int] = {}
        self._origins: dict[str, str] = {}
        self._verified: dict[str, _Stamps] = {}
        root.mkdir(parents=True, exist_ok=True)
        self._adopt()

    @property
    def used_bytes(self) -> int:
        """Bytes of all complete folders."""
        return self._used_bytes

    def __contains__(self, digest: str) -> bool:
        # Without the lock, which may be held for as long as a disk takes: the device thread asks too.
        return folder_name(digest) in self._sizes

    def origins(self) -> list[str]:
        """Return what the fetchers said of every folder here, where they said anything."""
        with self._lock:
            return [origin for origin in self._origins.values() if origin]

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
            trash = self._take_out(name)
        shutil.rmtree(trash)
        return True

    @contextmanager
    def open(self, digest: str, fetcher: Fetcher, times: LoadTimes) -> Iterator[Path]:
        """Give the adapter's folder, fetched if need be; it is not evicted while it is open.

        The caller opens one digest once at a time.

        Raises:
            LorafleetError: what the fetcher raised; `DataLoss` where the fetched folder is not whole;
                `ResourceExhausted` (`adapter_exceeds_disk`) where it is larger than the whole budget.
            OSError: the disk failed.
        """
        name = folder_name(digest)
        with self._lock:
            self._users[name] = self._users.get(name, 0) + 1
        try:
            if not self._is_whole(name, times):
                self._fetch(name, digest, fetcher, times)
            self._touch(name)
            yield self._root / name
        finally:
            with self._lock:
                self._users[name] -= 1
                if self._users[name] == 0:
                    del self._users[name]

    def _adopt(self) -> None:
        folders = [entry for entry in self._root.iterdir() if entry.is_dir()]
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
            is_named = _DIGEST.fullmatch(folder.name) is not None
            manifest = _read_manifest(folder) if is_named else None
            if manifest is not None:
                self._add(folder.name, _folder_bytes(folder), manifest.origin)
            elif is_named or folder.name.startswith(_TEMPORARY_PREFIX):
                shutil.rmtree(folder)

    def _touch(self, name: str) -> None:
        """Count a use, also for the time after a restart."""
        os.utime(self._root / name)
        with self._lock:
            self._sizes.move_to_end(name)

    def _add(self, name: str, size_bytes: int, origin: str) -> None:
        self._sizes[name] = size_bytes
        self._origins[name] = origin
        self._used_bytes += size_bytes
        count_bytes("disk", size_bytes)

    def _is_whole(self, name: str, times: LoadTimes) -> bool:
        if name not in self._sizes:
            return False
        stamps = _stamps(self._root / name)
        if stamps is not None and self._verified.get(name) == stamps:
            return True
        with times.measure(Stage.VERIFY):
            manifest = _read_manifest(self._root / name)
            is_whole = manifest is not None and manifest.digests == _hashed(self._root / name)
        if is_whole and stamps is not None:
            self._verified[name] = stamps
            return True
        with self._lock:
            trash = self._take_out(name)
        shutil.rmtree(trash)
        return False

    def _fetch(self, name: str, digest: str, fetcher: Fetcher, times: LoadTimes) -> None:
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=self._root))
        try:
            started = time.perf_counter()
            fetched = fetcher.fetch(digest, temporary)
            verify_seconds = 0.0 if fetched is None else fetched.verify_seconds
            times.add(Stage.DOWNLOAD, time.perf_counter() - started - verify_seconds)
            times.add(Stage.VERIFY, verify_seconds)
            _check_files(temporary)
            if fetched is None:
                with times.measure(Stage.VERIFY):
                    fetched = Fetched({name: _sha256(temporary / name) for name in _FILES})
            _Manifest(fetched.digests, fetched.origin).write(temporary)
            stamps = _stamps(temporary)
            size_bytes = _folder_bytes(temporary)
            self._make_room(size_bytes)
            failpoint("disk.before_visible")
            os.replace(temporary, self._root / name)
            failpoint("disk.after_visible")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        with self._lock:
            self._add(name, size_bytes, fetched.origin)
            if stamps is not None:
                self._verified[name] = stamps

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._budget_bytes:
            raise ResourceExhausted(
                "adapter_exceeds_disk",
                f"The adapter takes {size_bytes} bytes on disk; the disk tier has {self._budget_bytes}.",
                value=size_bytes,
                limit=self._budget_bytes,
            )
        trash = []
        with self._lock:
            if self._used_bytes + size_bytes <= self._budget_bytes:
                return
            for name in [name for name in self._sizes if name not in self._users]:
                if self._used_bytes + size_bytes <= self._budget_bytes:
                    break
                trash.append(self._take_out(name))
        for folder in trash:
            shutil.rmtree(folder)

    def _take_out(self, name: str) -> Path:
        """Forget a folder, under the lock, and return where its files are now, to be removed without it.

        Moved first: a folder that is half deleted must not be taken for a whole one after a crash.
        """
        size_bytes = self._sizes.pop(name)
        self._used_bytes -= size_bytes
        count_bytes("disk", -size_bytes)
        self._origins.pop(name)
        self._verified.pop(name, None)
        trash = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=self._root))
        os.replace(self._root / name, trash / name)
        failpoint("disk.evicting")
        return trash


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


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What a folder says of itself: the SHA-256 of each file, and what the fetcher wants to hear again."""

    digests: Mapping[str, str]
    origin: str

    def write(self, folder: Path) -> None:
        text = json.dumps({"files": dict(self.digests), "origin": self.origin})
        (folder / _MANIFEST).write_text(text, encoding="utf-8")


def _read_manifest(folder: Path) -> _Manifest | None:
    """Return the manifest; None where there is none that can be read."""
    try:
        fields = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return _Manifest({name: str(fields["files"][name]) for name in _FILES}, str(fields["origin"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_files(folder: Path) -> None:
    present = sorted(path.name for path in folder.iterdir())
    if present != sorted(_FILES):
        raise DataLoss(
            "adapter_incomplete", f"The fetched adapter has the files {present}.", limit=list(_FILES)
        )


# Size and time of change of each file: what alters when somebody else writes to it.
_Stamps = tuple[tuple[int, int], ...]


def _stamps(folder: Path) -> _Stamps | None:
    try:
        stats = [(folder / name).stat() for name in _FILES]
    except OSError:
        return None
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


def _hashed(folder: Path) -> dict[str, str] | None:
    try:
        return {name: _sha256(folder / name) for name in _FILES}
    except OSError:
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
