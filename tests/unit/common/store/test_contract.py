"""One contract, every store: a directory, and a bucket of a real S3 server."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import LorafleetError
from services.common.store import ObjectExistsError, ObjectNotFoundError, ObjectStore, checked_key, open_store
from services.common.store.interface import STREAM_CHUNK_BYTES
from tests.support.s3_server import S3Server, s3_server

__all__ = ["s3_server"]

MIB = 1024 * 1024


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "directory":
        opened = open_store(f"file://{tmp_path}/objects")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        url = server.store_url("contract-" + secrets.token_hex(8))
        opened = open_store(url, access_key=server.access_key, secret_key=server.secret_key)
    opened.ready()
    yield opened
    opened.close()


def keys(store: ObjectStore, prefix: str = "", start_after: str = "") -> list[str]:
    return [found.key for found in store.list(prefix, start_after=start_after)]


def test_ready_may_be_called_again(store: ObjectStore) -> None:
    store.ready()
    assert keys(store) == []


def test_put_get_stat_delete(store: ObjectStore) -> None:
    store.put("a/b/c.json", b"hello")
    assert store.get("a/b/c.json") == b"hello"
    found = store.stat("a/b/c.json")
    assert (found.key, found.size_bytes) == ("a/b/c.json", 5)
    assert found.modified_unix_seconds > 1.7e9
    store.put("a/b/c.json", b"")
    assert store.get("a/b/c.json") == b""
    store.delete("a/b/c.json")
    store.delete("a/b/c.json")
    assert keys(store) == []


def test_what_is_not_there(store: ObjectStore) -> None:
    store.put("a/b", b"x")
    for key in ("nothing", "a", "a/c", "a/b/c"):
        with pytest.raises(ObjectNotFoundError):
            store.get(key)
        with pytest.raises(ObjectNotFoundError):
            store.stat(key)
        with pytest.raises(ObjectNotFoundError):
            next(store.stream(key))
        with pytest.raises(ObjectNotFoundError):
            next(store.stream(key, length=0))
        store.delete(key)
    assert store.get("a/b") == b"x"


def test_if_absent(store: ObjectStore) -> None:
    store.put("k", b"first", if_absent=True)
    with pytest.raises(ObjectExistsError):
        store.put("k", b"second", if_absent=True)
    assert store.get("k") == b"first"
    store.put("k", b"third")
    assert store.get("k") == b"third"


def test_chunks_of_any_size(store: ObjectStore) -> None:
    chunks = [b"", b"a" * 3, b"", b"b" * (9 * MIB), b"c" * 5]
    store.put("big", iter(chunks))
    assert store.get("big") == b"".join(chunks)
    store.put("none", iter([]))
    assert store.get("none") == b""


def test_a_failing_source_leaves_the_old_object(store: ObjectStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * (9 * MIB)
        raise RuntimeError("the source broke")

    store.put("k", b"old")
    for key in ("k", "new"):
        with pytest.raises(RuntimeError):
            store.put(key, broken())
    assert keys(store) == ["k"]
    assert store.get("k") == b"old"


def test_put_file(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "source"
    data = secrets.token_bytes(10 * MIB + 7)
    path.write_bytes(data)
    store.put_file("f", path)
    with pytest.raises(ObjectExistsError):
        store.put_file("f", path, if_absent=True)
    assert store.get("f") == data
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, None), (7, None), (0, 0), (5, 10), (MIB - 3, 6), (3 * MIB - 1, 100), (3 * MIB, None), (9 * MIB, 5)],
)
def test_ranges(store: ObjectStore, offset: int, length: int | None) -> None:
    data = secrets.token_bytes(3 * MIB)
    store.put("r", data)
    chunks = list(store.stream("r", offset=offset, length=length))
    assert b"".join(chunks) == data[offset : None if length is None else offset + length]
    assert all(0 < len(chunk) <= STREAM_CHUNK_BYTES for chunk in chunks)


def test_abandoned_streams_give_their_connection_back(store: ObjectStore) -> None:
    store.put("r", bytes(3 * MIB))
    for _ in range(40):
        stream = store.stream("r")
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(store.get("r")) == 3 * MIB


def test_list_is_in_key_order(store: ObjectStore) -> None:
    names = ["a-b/1", "a/1", "a/10", "a/2", "a/b/c", "a/b-c", "aa", "b", "B", "a0"]
    for name in names:
        store.put(name, b"x" * len(name))
    assert keys(store) == sorted(names)
    assert [found.size_bytes for found in store.list("")] == [len(name) for name in sorted(names)]
    for prefix in ("a", "a/", "a/1", "a/b", "a/b/", "zzz/"):
        assert keys(store, prefix) == sorted(name for name in names if name.startswith(prefix)), prefix
    for start_after in ("a", "a/", "a/10", "a/b/c", "a/zzz", "b", "zzz"):
        assert keys(store, "", start_after) == sorted(name for name in names if name > start_after), (
            start_after
        )
        assert keys(store, "a/", start_after) == sorted(
            name for name in names if name.startswith("a/") and name > start_after
        )


def test_racing_writers_of_one_content(store: ObjectStore) -> None:
    data = secrets.token_bytes(200_000)
    failures: list[Exception] = []

    def write() -> None:
        try:
            store.put("same", data, if_absent=True)
        except ObjectExistsError:
            return
        except Exception as error:  # noqa: BLE001 - a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.get("same") == data


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        "a/.hidden",
        ".tmp/x",
        "a b",
        "a\0",
        "a\n",
        "é",
        "x" * 2000,
        "a\\b",
    ],
)
def test_keys_that_no_code_of_ours_builds(store: ObjectStore, key: str) -> None:
    for call in (store.get, store.stat, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(ValueError, match="cannot be an object key"):
            call(key)
    with pytest.raises(ValueError, match="cannot be an object key"):
        checked_key(key)
    assert keys(store) == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/x",
        "file://relative",
        "file:///x?y=1",
        "s3://bucket",
        "s3://?endpoint=http://h:1",
        "s3://bucket?endpoint=ftp://h:1",
        "s3://bucket/prefix?endpoint=http://h:1",
        "s3://bucket?endpoint=http://h:1&regoin=x",
        "gs://bucket",
    ],
)
def test_bad_store_urls(url: str) -> None:
    with pytest.raises(LorafleetError) as caught:
        open_store(url, access_key="a", secret_key="b")
    assert caught.value.reason == "bad_store_url"


def test_s3_needs_credentials() -> None:
    with pytest.raises(LorafleetError) as caught:
        open_store("s3://bucket?endpoint=http://127.0.0.1:1")
    assert caught.value.reason == "missing_store_credentials"
