"""The disk tier: what it trusts, what it throws away, and what it tells after a restart."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from services.common.errors import DataLoss
from services.inference.adapters.disk import DiskTier, Fetched
from services.inference.adapters.stages import LoadTimes, Stage
from tests.support.engines import digest_of

NAMES = ("adapter_config.json", "adapter_model.safetensors")


class Fetcher:
    """Writes files whose bytes depend on the digest alone."""

    def __init__(self, *, hashes: bool = True, size_bytes: int = 1000) -> None:
        self.fetches: list[str] = []
        self.files = list(NAMES)
        self._hashes = hashes
        self._size_bytes = size_bytes

    def fetch(self, digest: str, into: Path) -> Fetched | None:
        self.fetches.append(digest)
        data = digest.encode() * (self._size_bytes // len(digest))
        for name in self.files:
            (into / name).write_bytes(data)
        if not self._hashes:
            return None
        digests = dict.fromkeys(NAMES, hashlib.sha256(data).hexdigest())
        return Fetched(digests, verify_seconds=0.25, origin=f"from {digest[-4:]}")


def read(disk: DiskTier, fetcher: Fetcher, name: str) -> tuple[bytes, LoadTimes]:
    times = LoadTimes()
    with disk.open(digest_of(name), fetcher, times) as folder:
        return (folder / NAMES[1]).read_bytes(), times


def weights_of(root: Path, name: str) -> Path:
    return root / digest_of(name).removeprefix("sha256:") / NAMES[1]


@pytest.mark.parametrize("hashes", [True, False])
def test_stages_are_timed_and_nothing_is_hashed_twice(tmp_path: Path, hashes: bool) -> None:
    disk, fetcher = DiskTier(tmp_path, 1 << 20), Fetcher(hashes=hashes)
    _, cold = read(disk, fetcher, "a")
    assert set(cold.seconds) == {Stage.DOWNLOAD, Stage.VERIFY}
    if hashes:
        assert cold.seconds[Stage.VERIFY] == 0.25
    _, warm = read(disk, fetcher, "a")
    assert warm.seconds == {}
    _, after_restart = read(DiskTier(tmp_path, 1 << 20), fetcher, "a")
    assert set(after_restart.seconds) == {Stage.VERIFY}
    assert len(fetcher.fetches) == 1


@pytest.mark.parametrize("is_restarted", [False, True])
def test_row_39_altered_bytes_are_never_read(tmp_path: Path, is_restarted: bool) -> None:
    disk, fetcher = DiskTier(tmp_path, 1 << 20), Fetcher()
    good, _ = read(disk, fetcher, "a")
    data = bytearray(good)
    data[len(data) // 2] ^= 1
    weights_of(tmp_path, "a").write_bytes(data)
    if is_restarted:
        disk = DiskTier(tmp_path, 1 << 20)
    again, _ = read(disk, fetcher, "a")
    assert again == good
    assert len(fetcher.fetches) == 2


def test_a_bit_that_flips_below_the_file_system_is_found_after_a_restart(tmp_path: Path) -> None:
    disk, fetcher = DiskTier(tmp_path, 1 << 20), Fetcher()
    good, _ = read(disk, fetcher, "a")
    path = weights_of(tmp_path, "a")
    stat = path.stat()
    path.write_bytes(good[:-1] + b"x")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again, _ = read(DiskTier(tmp_path, 1 << 20), fetcher, "a")
    assert again == good


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"files": {}}', '{"files": 3, "origin": ""}'])
def test_a_folder_without_a_manifest_is_no_folder(tmp_path: Path, manifest: str | None) -> None:
    fetcher = Fetcher()
    read(DiskTier(tmp_path, 1 << 20), fetcher, "a")
    path = weights_of(tmp_path, "a").with_name("manifest.json")
    if manifest is None:
        path.unlink()
    else:
        path.write_text(manifest)
    disk = DiskTier(tmp_path, 1 << 20)
    assert (disk.used_bytes, digest_of("a") in disk) == (0, False)
    read(disk, fetcher, "a")
    assert len(fetcher.fetches) == 2


def test_origins_are_told_again_after_a_restart(tmp_path: Path) -> None:
    fetcher = Fetcher()
    disk = DiskTier(tmp_path, 1 << 20)
    read(disk, fetcher, "a")
    read(disk, fetcher, "b")
    disk.discard(digest_of("a"))
    for one in (disk, DiskTier(tmp_path, 1 << 20)):
        assert one.origins() == [f"from {digest_of('b')[-4:]}"]


def test_least_recently_used_goes_first_also_after_a_restart(tmp_path: Path) -> None:
    fetcher = Fetcher(size_bytes=10_000)
    disk = DiskTier(tmp_path, 1 << 20)
    for name in "abc":
        read(disk, fetcher, name)
    size_bytes = disk.used_bytes // 3
    for number, name in enumerate("bca"):
        folder = weights_of(tmp_path, name).parent
        os.utime(folder, (1000 + number, 1000 + number))
    disk = DiskTier(tmp_path, 3 * size_bytes + 100)
    read(disk, fetcher, "b")
    read(disk, fetcher, "d")
    assert [digest_of(name) in disk for name in "abcd"] == [True, True, False, True]
    assert disk.used_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_what_is_open_stays(tmp_path: Path) -> None:
    fetcher = Fetcher(size_bytes=10_000)
    disk = DiskTier(tmp_path, 25_000)
    with disk.open(digest_of("a"), fetcher, LoadTimes()) as folder:
        assert not disk.discard(digest_of("a"))
        read(disk, fetcher, "b")
        assert (folder / NAMES[1]).exists()
    assert disk.discard(digest_of("a"))


def test_unexpected_files_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    disk, fetcher = DiskTier(tmp_path, 1 << 20), Fetcher()
    fetcher.files.append("extra.bin")
    with pytest.raises(DataLoss) as caught:
        read(disk, fetcher, "a")
    assert caught.value.reason == "adapter_incomplete"
    assert list(tmp_path.iterdir()) == []


def test_other_files_beside_the_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_text(json.dumps([]))
    DiskTier(tmp_path, 1 << 20)
    assert [path.name for path in tmp_path.iterdir()] == ["pins.json"]
