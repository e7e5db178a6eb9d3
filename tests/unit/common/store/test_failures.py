"""What each store does when the disk, the network or the process fails."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from minio.credentials.providers import StaticProvider

from services.common.errors import LorafleetError
from services.common.store import DirectoryStore, ObjectExistsError, S3Store
from tests.support.s3_server import S3Server, s3_server

__all__ = ["s3_server"]


def test_directory_create_once_has_one_winner(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    winners: list[bytes] = []
    start = threading.Barrier(16)

    def write(data: bytes) -> None:
        start.wait()
        try:
            store.put("deep/er/k", data, if_absent=True)
        except ObjectExistsError:
            return
        winners.append(data)

    threads = [threading.Thread(target=write, args=(b"%d" % number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert store.get("deep/er/k") == winners[0]
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_directory_survives_kill_amid_writes(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import itertools, sys
        from pathlib import Path
        from services.common.store import DirectoryStore
        store = DirectoryStore(Path(sys.argv[1]))
        for number in itertools.count():
            store.put(f"objects/{number}", f"{number};".encode() * 20_000)
            print(number, flush=True)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.readlines()
    store = DirectoryStore(tmp_path)
    store.ready()
    stored = {found.key for found in store.list("objects/")}
    assert {f"objects/{int(line)}" for line in acknowledged if line.endswith(b"\n")} <= stored
    for key in stored:
        assert store.get(key) == (key.removeprefix("objects/") + ";").encode() * 20_000


def test_directory_sweeps_only_old_temporary_files(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.ready()
    old, new = tmp_path / ".tmp" / "old", tmp_path / ".tmp" / "new"
    old.touch()
    new.touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    store.ready()
    assert list((tmp_path / ".tmp").iterdir()) == [new]


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "storage_full"), (errno.EIO, "store_unavailable")]
)
def test_directory_reports_what_the_disk_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    store = DirectoryStore(tmp_path)

    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(LorafleetError) as caught:
        store.put("k", b"x")
    assert caught.value.reason == reason
    assert list(store.list("")) == []
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_s3_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = S3Store(
        f"127.0.0.1:{port}",
        "bucket",
        credentials=StaticProvider("a", "b"),
        secure=False,
        connect_timeout_seconds=1,
        retries=1,
    )
    for call in (
        store.ready,
        lambda: store.get("k"),
        lambda: store.put("k", b"x"),
        lambda: list(store.list("")),
    ):
        with pytest.raises(LorafleetError) as caught:
            call()
        assert caught.value.reason == "store_unavailable"
    store.close()


def test_s3_wrong_secret(s3_server: S3Server) -> None:
    host = s3_server.endpoint.partition("://")[2]
    secure = s3_server.endpoint.startswith("https")
    wrong = StaticProvider(s3_server.access_key, "wrong-secret")
    store = S3Store(host, "bucket", credentials=wrong, secure=secure)
    with pytest.raises(LorafleetError) as caught:
        store.get("k")
    assert caught.value.reason == "store_unavailable"
    store.close()
