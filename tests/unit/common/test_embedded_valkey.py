"""The embedded Valkey: durable under kill -9, no orphan, no strangers; and clients of the index."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr
from redis.exceptions import ResponseError

from services.common.errors import Unavailable
from services.common.index_connection import index_errors, open_index, ping
from services.common.valkey import EmbeddedValkey

ROOT = Path(__file__).parents[3]


@contextmanager
def client_of(server: EmbeddedValkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_acknowledged_writes_survive_kill_9(tmp_path: Path) -> None:
    with EmbeddedValkey.start(tmp_path) as server, client_of(server) as client:
        for number in range(200):
            client.set(f"key:{number}", number)
        os.kill(server.pid, signal.SIGKILL)
    with EmbeddedValkey.start(tmp_path, port=server.port) as again, client_of(again) as client:
        assert again.port == server.port
        assert client.dbsize() == 200
        assert list(client.config_get("appendfsync").values()) == ["always"]


def test_stop_ends_the_process(tmp_path: Path) -> None:
    with EmbeddedValkey.start(tmp_path) as server:
        assert is_alive(server.pid)
    assert not is_alive(server.pid)
    server.stop()


def test_the_server_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from services.common.valkey import EmbeddedValkey\n"
        f"server = EmbeddedValkey.start(pathlib.Path({str(tmp_path)!r}))\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)


def test_a_port_held_by_another_server_is_an_error(tmp_path: Path, valkey_server: EmbeddedValkey) -> None:
    with pytest.raises(Unavailable, match="valkey_not_started"):
        EmbeddedValkey.start(tmp_path, port=valkey_server.port, wait_seconds=5)
    assert valkey_server.is_running


async def test_index_client_works_and_keeps_bytes(redis_url: str) -> None:
    async with open_index(SecretStr(redis_url)) as index:
        await ping(index)
        assert await index.dbsize() == 0
        await index.set("a", b"\xff\x00")
        assert await index.get("a") == b"\xff\x00"
        with pytest.raises(ResponseError), index_errors():
            await index.incr("a")


async def test_a_stopped_index_is_unavailable_soon_and_comes_back(tmp_path: Path) -> None:
    server = EmbeddedValkey.start(tmp_path)
    async with open_index(SecretStr(server.url)) as index:
        await ping(index)
        server.stop()
        started = time.monotonic()
        with pytest.raises(Unavailable) as refused:
            await ping(index)
        assert time.monotonic() - started < 3
        assert refused.value.reason == "store_unavailable"
        assert refused.value.retry_after_seconds == 1
        with EmbeddedValkey.start(tmp_path, port=server.port):
            await ping(index)


async def test_a_command_that_stalls_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.index_connection.COMMAND_TIMEOUT_SECONDS", 0.3)
    with EmbeddedValkey.start(tmp_path) as server:
        async with open_index(SecretStr(server.url)) as index:
            await index.set("count", 0)
            os.kill(server.pid, signal.SIGSTOP)
            # It goes on while a client that retries would be at its second attempt.
            asyncio.get_running_loop().call_later(0.45, os.kill, server.pid, signal.SIGCONT)
            with pytest.raises(Unavailable), index_errors():
                await index.incr("count")
            await asyncio.sleep(0.4)
            assert int(await index.get("count") or 0) == 1


async def test_a_blocking_client_outlives_the_command_timeout(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.common.index_connection.COMMAND_TIMEOUT_SECONDS", 0.2)
    async with open_index(SecretStr(redis_url), blocking=True) as index:
        assert await index.blpop(["queue"], timeout=1) is None
