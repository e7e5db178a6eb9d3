"""Adapters through the real registry: a real server, a real Valkey, a real store."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis.asyncio

from lorafleet.registry.v1 import adapter_pb2
from services.common.errors import Code, LorafleetError
from services.common.store import DirectoryStore
from tests.support.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from tests.support.registry import (
    FINGERPRINT,
    Client,
    Place,
    Upload,
    reason_of,
    registry_client,
    running_registry,
    sha256,
)
from tests.support.s3_server import S3Server, s3_server

__all__ = ["s3_server"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Place:
    if request.param == "directory":
        return Place.in_directory(redis_url, tmp_path / "objects")
    server: S3Server = request.getfixturevalue("s3_server")
    return Place.in_s3(redis_url, server, "registry-" + secrets.token_hex(8))


@pytest.fixture
def local(redis_url: str, tmp_path: Path) -> Place:
    return Place.in_directory(redis_url, tmp_path / "objects")


@pytest.fixture
async def client(local: Place) -> AsyncIterator[Client]:
    async with registry_client(local) as running:
        yield running


def stored_keys(tmp_path: Path) -> list[str]:
    return [found.key for found in DirectoryStore(tmp_path / "objects").list("")]


async def flush(place: Place) -> None:
    async with redis.asyncio.Redis.from_url(place.redis_url) as index:
        await index.flushall()


async def everything(client: Client) -> list[Any]:
    """All that the tenant can list."""
    stub = client.adapters
    found: list[Any] = [await client.call(stub.ListAdapters, adapter_pb2.ListAdaptersRequest())]
    for adapter in found[0].adapters:
        request = adapter_pb2.ListVersionsRequest(adapter=adapter.name, include_deleted=True)
        found.append(await client.call(stub.ListVersions, request))
        found.append(await client.call(stub.GetAdapter, adapter_pb2.GetAdapterRequest(adapter=adapter.name)))
        for alias in adapter.aliases:
            history = adapter_pb2.ListAliasHistoryRequest(adapter=adapter.name, alias=alias.name)
            found.append(await client.call(stub.ListAliasHistory, history))
    found.append(await client.call(stub.ListAliases, adapter_pb2.ListAliasesRequest()))
    return found


async def populate(client: Client) -> None:
    """Two adapters, four versions, one of them deleted, two aliases, one of them deleted."""
    for seed in range(3):
        await client.publish(Upload.made(seed), key=f"key-{seed}", description=f"number {seed}", seed=seed)
    await client.publish(Upload.made(9), adapter="sorting")
    await client.set_alias("prod", 1)
    await client.set_alias("prod", 2)
    await client.set_alias("old", 1)
    await client.call(
        client.adapters.DeleteAlias, adapter_pb2.DeleteAliasRequest(adapter="billing", alias="old")
    )
    await client.call(
        client.adapters.DeleteVersion, adapter_pb2.DeleteVersionRequest(adapter="billing", version=3)
    )


async def test_publish_resolve_download(place: Place) -> None:
    upload = Upload.made(1)
    async with registry_client(place) as client:
        published = await client.publish(
            upload,
            description="Sorts letters.",
            hyperparameters={"learning_rate": "1e-4"},
            stop_token_ids=[2, 0],
            metrics=[
                adapter_pb2.Metric(
                    name="accuracy", subject="base", value=0.5, ci_low=0.4, rows=10, split="test"
                )
            ],
        )
        assert published.version == 1
        assert published.state == adapter_pb2.VERSION_STATE_READY
        assert published.base_model == "tiny"
        assert published.base_fingerprint_digest == FINGERPRINT.digest
        assert published.format.max_rank == 2
        assert published.format.dtype == "float32"
        assert list(published.format.target_modules) == ["q_proj"]
        assert published.format.num_parameters == 22
        assert published.card.hyperparameters["learning_rate"] == "1e-4"
        assert published.card.metrics[0].HasField("ci_low")
        assert not published.card.metrics[0].HasField("ci_high")
        assert list(published.card.stop_token_ids) == [2, 0]
        await client.set_alias("prod", 1)
        for ref in ("billing", "billing:1", "billing@prod", f"billing@{published.digest}"):
            found = await client.resolve(ref)
            assert list(found.aliases) == ["prod"]
            assert (found.digest, found.card) == (published.digest, published.card)
        assert await client.download("billing", CONFIG) == upload.config
        assert await client.download("billing:1", WEIGHTS) == upload.weights
        for offset, length in [(0, 5), (7, 11), (len(upload.weights) - 3, 100), (len(upload.weights), 0)]:
            end = offset + length if length else None
            got = await client.download("billing", WEIGHTS, offset=offset, length=length)
            assert got == upload.weights[offset:end]
        past_the_end = client.download("billing", WEIGHTS, offset=len(upload.weights) + 1)
        assert await reason_of(past_the_end) == "bad_range"
        assert await reason_of(client.download("billing", "README.md")) == "unexpected_file"


async def test_everything_survives_a_flushed_index_and_a_restart(place: Place) -> None:
    async with registry_client(place) as client:
        await populate(client)
        before = await everything(client)
        await flush(place)
        assert await everything(client) == before
        again = await client.publish(Upload.made(1), key="key-1", description="number 1", seed=1)
        assert again.version == 2
        await flush(place)
        assert (await client.publish(Upload.made(5))).version == 4
        before = await everything(client)
    await flush(place)
    async with running_registry(place) as channel:
        client = Client(channel, "acme")
        assert await everything(client) == before
        assert (await client.publish(Upload.made(6))).version == 5
        before = await everything(client)
    async with running_registry(place) as channel:
        assert await everything(Client(channel, "acme")) == before


async def test_racing_publishers_get_a_version_each(place: Place) -> None:
    async with registry_client(place) as client:
        published = await asyncio.gather(*(client.publish(Upload.made(seed)) for seed in range(16)))
        assert sorted(version.version for version in published) == list(range(1, 17))
        for seed, version in enumerate(published):
            ref = f"billing:{version.version}"
            assert await client.download(ref, WEIGHTS) == Upload.made(seed).weights


async def test_flush_amid_racing_publishers_loses_nothing(client: Client, local: Place) -> None:
    async def flush_often() -> None:
        for _ in range(20):
            await flush(local)
            await asyncio.sleep(0.01)

    tasks = [client.publish(Upload.made(seed), key=f"k{seed}") for seed in range(12)]
    published, _ = await asyncio.gather(asyncio.gather(*tasks), flush_often())
    assert sorted(version.version for version in published) == list(range(1, 13))
    for version in published:
        assert (await client.resolve(f"billing:{version.version}")).digest == version.digest


async def test_an_index_set_back_to_an_older_state_is_noticed(client: Client, local: Place) -> None:
    await client.publish(Upload.made(0))
    async with redis.asyncio.Redis.from_url(local.redis_url) as index:
        dumps = {key: await index.dump(key) async for key in index.scan_iter("*")}
        await client.publish(Upload.made(1))
        await index.flushall()
        for key, value in dumps.items():
            assert value is not None
            await index.restore(key, 0, value)
    assert (await client.resolve("billing")).version == 2


async def test_a_record_that_missed_the_index_is_found_at_the_start(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        await client.publish(Upload.made(0))
    store = DirectoryStore(tmp_path / "objects")
    [key] = [key for key in stored_keys(tmp_path) if "/versions/" in key]
    second = store.get(key).replace(b'"version":1', b'"version":2')
    store.put("tenants/acme/adapters/billing/versions/000000002-x.json", second)
    async with running_registry(local) as channel:
        assert (await Client(channel, "acme").resolve("billing")).version == 2


async def test_two_records_of_one_number_are_both_kept(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        for seed in range(2):
            await client.publish(Upload.made(seed))
    store = DirectoryStore(tmp_path / "objects")
    key = next(key for key in stored_keys(tmp_path) if "/versions/000000001" in key)
    double = store.get(key).replace(sha256(Upload.made(0).weights).encode(), b"sha256:" + b"0" * 64)
    store.put("tenants/acme/adapters/billing/versions/000000001-zzz.json", double)
    for _ in range(2):
        await flush(local)
        async with running_registry(local) as channel:
            client = Client(channel, "acme")
            assert await client.download("billing:1", WEIGHTS) == Upload.made(0).weights
            assert (await client.resolve("billing:2")).version == 2
            assert (await client.resolve("billing:3")).files[1].digest == "sha256:" + "0" * 64
            assert await reason_of(client.resolve("billing:4")) == "version_not_found"


async def test_a_damaged_record_hides_only_itself(local: Place, tmp_path: Path) -> None:
    async with registry_client(local) as client:
        for seed in range(2):
            await client.publish(Upload.made(seed))
    key = next(key for key in stored_keys(tmp_path) if "/versions/000000002" in key)
    DirectoryStore(tmp_path / "objects").put(key, b'{"version":')
    await flush(local)
    async with running_registry(local) as channel:
        client = Client(channel, "acme")
        assert (await client.resolve("billing")).version == 1
        assert await reason_of(client.resolve("billing:2")) == "version_not_found"
        assert (await client.publish(Upload.made(2))).version == 3


async def test_idempotency(client: Client) -> None:
    upload = Upload.made(0)
    first = await client.publish(upload, key="job-1", hyperparameters={"a": "1", "b": "2"})
    again = await asyncio.gather(
        *(client.publish(upload, key="job-1", hyperparameters={"b": "2", "a": "1"}) for _ in range(4))
    )
    assert all(version == first for version in again)
    for other in (
        client.publish(Upload.made(1), key="job-1", hyperparameters={"a": "1", "b": "2"}),
        client.publish(upload, key="job-1", hyperparameters={"a": "1"}),
        client.publish(upload, key="job-1", adapter="another", hyperparameters={"a": "1", "b": "2"}),
    ):
        assert await reason_of(other) == "idempotency_key_reused"
    assert (await client.publish(upload)).version == 2
    assert (await client.publish(upload)).digest == first.digest


async def test_two_at_once_with_one_key_make_one_version(client: Client) -> None:
    published = await asyncio.gather(*(client.publish(Upload.made(0), key="same") for _ in range(8)))
    assert {version.version for version in published} == {1}
    assert await reason_of(client.resolve("billing:2")) == "version_not_found"


async def test_another_tenant_sees_nothing(client: Client, local: Place) -> None:
    mine = await client.publish(Upload.made(0), key="k")
    await client.set_alias("prod", 1)
    file = await client.create_file(b"secret")
    async with running_registry(local) as channel:
        other = Client(channel, "rival")

        def calls(adapter: str, digest: str) -> list[Any]:
            stub, messages = other.adapters, adapter_pb2
            return [
                other.resolve(adapter),
                other.resolve(f"{adapter}:1"),
                other.resolve(f"{adapter}@prod"),
                other.resolve(f"{adapter}@{digest}"),
                other.download(adapter, WEIGHTS),
                other.set_alias("prod", 1, adapter=adapter),
                other.call(stub.GetAdapter, messages.GetAdapterRequest(adapter=adapter)),
                other.call(stub.ListVersions, messages.ListVersionsRequest(adapter=adapter)),
                other.call(stub.ListAliases, messages.ListAliasesRequest(adapter=adapter)),
                other.call(
                    stub.ListAliasHistory, messages.ListAliasHistoryRequest(adapter=adapter, alias="prod")
                ),
                other.call(stub.RollbackAlias, messages.RollbackAliasRequest(adapter=adapter, alias="prod")),
                other.call(stub.DeleteAlias, messages.DeleteAliasRequest(adapter=adapter, alias="prod")),
                other.call(stub.DeleteVersion, messages.DeleteVersionRequest(adapter=adapter, version=1)),
                other.call(stub.DeleteAdapter, messages.DeleteAdapterRequest(adapter=adapter)),
            ]

        for theirs, nobodys in zip(calls("billing", mine.digest), calls("unknown", mine.digest), strict=True):
            errors = []
            for call in (theirs, nobodys):
                with pytest.raises(LorafleetError) as caught:
                    await call
                errors.append(caught.value)
            assert errors[0].code is errors[1].code is Code.NOT_FOUND
            assert errors[0].message == errors[1].message.replace("unknown", "billing")
            assert errors[0].reason == errors[1].reason == "adapter_not_found"
        assert await reason_of(other.download_file(file.id)) == "file_not_found"
        listed = await other.call(other.adapters.ListAdapters, adapter_pb2.ListAdaptersRequest())
        assert list(listed.adapters) == []
        # The same key and the same bytes are another tenant's own publication.
        theirs = await other.publish(Upload.made(0), key="k")
        assert (theirs.version, theirs.digest) == (1, mine.digest)


BAD_UPLOADS: dict[str, Upload] = {
    "missing_file": Upload(config_bytes(), b""),
    "not_safetensors": Upload(config_bytes(), b"PK\x03\x04" + bytes(100)),
    "bad_rank": Upload.made(0, r=0),
    "rank_mismatch": Upload.made(0, r=3),
    "rank_too_large": Upload.made(0, r=64),
    "unsupported_feature": Upload.made(0, use_dora=True),
    "unsupported_field": Upload.made(0, auto_mapping={"parent_library": "os"}),
    "bad_offsets": Upload(config_bytes(), safetensors_bytes(lora_tensors()) + b"\0"),
    "base_mismatch": Upload(config_bytes(r=3), safetensors_bytes(lora_tensors(3))),
    "unexpected_tensor": Upload.made(0, target_modules=["v_proj"]),
}


@pytest.mark.parametrize("reason", BAD_UPLOADS)
async def test_bad_files_leave_nothing(local: Place, tmp_path: Path, reason: str) -> None:
    async with registry_client(local, max_rank=32) as client:
        before = stored_keys(tmp_path)
        upload = BAD_UPLOADS[reason]
        header = upload.header(base_digest=FINGERPRINT.digest)
        if reason == "base_mismatch":
            tensors = {
                name.replace("layers.0", "layers.7"): tensor for name, tensor in lora_tensors(3).items()
            }
            upload = Upload(upload.config, safetensors_bytes(tensors))
            header = upload.header()
        assert await reason_of(client.publish(upload, header)) == reason
        assert stored_keys(tmp_path) == before
        assert await reason_of(client.resolve("billing")) == "adapter_not_found"


def edited(change: Callable[[adapter_pb2.PublishVersionHeader], object]) -> adapter_pb2.PublishVersionHeader:
    header = Upload.made(0).header()
    change(header)
    return header


BAD_HEADERS: list[tuple[str, adapter_pb2.PublishVersionHeader]] = [
    *(
        ("bad_name", edited(lambda h, name=name: setattr(h, "adapter", name)))  # type: ignore[misc]
        for name in (
            "",
            "../../x",
            "a/b",
            ".",
            "a\0",
            "a\r\n",
            "x" * 300,
            "Billing",
            "b\u0456lling",
            "a.",
            "a%2Fb",
        )
    ),
    ("bad_digest", edited(lambda h: setattr(h, "base_fingerprint_digest", "sha256:XYZ"))),
    ("bad_digest", edited(lambda h: setattr(h.files[0], "digest", h.files[0].digest.upper()))),
    ("bad_digest", edited(lambda h: setattr(h.files[0], "digest", "md5:" + "0" * 32))),
    ("base_not_found", edited(lambda h: setattr(h, "base_fingerprint_digest", sha256(b"other")))),
    ("digest_mismatch", edited(lambda h: setattr(h.files[0], "digest", sha256(b"other")))),
    ("digest_mismatch", edited(lambda h: setattr(h.files[1], "size_bytes", 3))),
    ("digest_mismatch", edited(lambda h: setattr(h.files[1], "size_bytes", 3000))),
    ("config_too_large", edited(lambda h: setattr(h.files[0], "size_bytes", 10**9))),
    ("too_large", edited(lambda h: setattr(h.files[1], "size_bytes", 10**15))),
    ("unsafe_weight_format", edited(lambda h: setattr(h.files[1], "name", "adapter_model.bin"))),
    ("archives_not_supported", edited(lambda h: setattr(h.files[1], "name", "adapter.zip"))),
    ("missing_file", edited(lambda h: h.files.pop())),
    ("unexpected_file", edited(lambda h: h.files.add(name="README.md", digest=sha256(b"")))),
    ("unexpected_file", edited(lambda h: h.files.append(h.files[0]))),
    ("bad_idempotency_key", edited(lambda h: setattr(h, "idempotency_key", "x" * 65))),
    ("bad_idempotency_key", edited(lambda h: setattr(h, "idempotency_key", "a\n"))),
    ("bad_card", edited(lambda h: setattr(h.card, "description", "x" * 17_000))),
    ("bad_card", edited(lambda h: h.card.hyperparameters.update({str(n): "" for n in range(65)}))),
    ("bad_card", edited(lambda h: h.card.metrics.add(name="a", subject="base", value=float("nan")))),
    ("bad_digest", edited(lambda h: setattr(h.card, "parent_digest", "x"))),
]


async def test_bad_headers_leave_nothing(client: Client, tmp_path: Path) -> None:
    before = stored_keys(tmp_path)
    for expected, header in BAD_HEADERS:
        assert await reason_of(client.publish(Upload.made(0), header)) == expected, (expected, header)
    assert stored_keys(tmp_path) == before


async def test_broken_streams_leave_nothing(client: Client, tmp_path: Path) -> None:
    before = stored_keys(tmp_path)
    upload = Upload.made(0)
    messages = list(upload.requests(upload.header()))
    chunk = adapter_pb2.FileChunk
    stray = adapter_pb2.PublishVersionRequest(chunk=chunk(file="other", data=b"x"))
    big = adapter_pb2.PublishVersionRequest(chunk=chunk(file=WEIGHTS, data=bytes(1024 * 1024 + 1)))
    for expected, stream in [
        ("bad_stream", []),
        ("bad_stream", messages[1:]),
        ("bad_stream", [messages[0], messages[0]]),
        ("digest_mismatch", messages[:-1]),
        ("digest_mismatch", [*messages, messages[-1]]),
        ("unexpected_file", [*messages, stray]),
        ("chunk_too_large", [messages[0], big]),
    ]:
        assert await reason_of(client.call(client.adapters.PublishVersion, iter(stream))) == expected
    assert stored_keys(tmp_path) == before


async def test_a_cancelled_upload_leaves_nothing(local: Place, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    async with registry_client(local, scratch_dir=scratch) as client:
        before = stored_keys(tmp_path)
        upload = Upload.made(0)
        messages = list(upload.requests(upload.header()))
        stub = client.adapters.PublishVersion
        call: Any = stub(metadata=(("lorafleet-tenant", "acme"),))
        for message in messages[:4]:
            await call.write(message)
        while not list(scratch.iterdir()):  # noqa: ASYNC110 - the server works in its own time
            await asyncio.sleep(0.01)
        call.cancel()
        while list(scratch.iterdir()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert stored_keys(tmp_path) == before
        assert (await client.publish(upload)).version == 1


async def test_corrupt_bytes_are_never_served_whole(client: Client, tmp_path: Path) -> None:
    upload = Upload.made(0)
    await client.publish(upload)
    store = DirectoryStore(tmp_path / "objects")
    hexadecimal = sha256(upload.weights).removeprefix("sha256:")
    key = f"blobs/sha256/{hexadecimal[:2]}/{hexadecimal}"
    damaged = bytearray(upload.weights)
    damaged[-1] ^= 1
    for bad in (bytes(damaged), upload.weights[:-1], b""):
        store.put(key, bad)
        assert await reason_of(client.download("billing", WEIGHTS)) == "corrupt_blob"
        assert await reason_of(client.download("billing", WEIGHTS, offset=3, length=4)) == "corrupt_blob"
    store.delete(key)
    assert await reason_of(client.download("billing", WEIGHTS)) == "corrupt_blob"
    store.put(key, bytes(damaged))
    # Publishing the same bytes again mends the copy.
    await client.publish(upload)
    assert await client.download("billing:1", WEIGHTS) == upload.weights


async def test_alias_compare_and_set(client: Client) -> None:
    for seed in range(3):
        await client.publish(Upload.made(seed))
    assert (await client.set_alias("prod", 1, expected=0)).generation == 1
    with pytest.raises(LorafleetError) as caught:
        await client.set_alias("prod", 2, expected=0)
    assert (caught.value.code, caught.value.reason, caught.value.final) == (
        Code.ABORTED,
        "alias_conflict",
        True,
    )
    assert caught.value.metadata["generation"] == "1"
    assert (await client.set_alias("prod", 2, expected=1)).generation == 2
    assert (await client.set_alias("prod", 3)).generation == 3
    assert (await client.resolve("billing@prod")).version == 3
    outcomes = await asyncio.gather(
        *(reason_of(client.set_alias("prod", 1 + number % 3, expected=3)) for number in range(8))
    )
    assert sorted(outcomes) == ["alias_conflict"] * 7 + ["no error"]


async def test_alias_history_rollback_and_delete(client: Client) -> None:
    stub = client.adapters
    for seed in range(2):
        await client.publish(Upload.made(seed))
    rollback = adapter_pb2.RollbackAliasRequest(adapter="billing", alias="prod")
    delete = adapter_pb2.DeleteAliasRequest(adapter="billing", alias="prod")
    assert await reason_of(client.call(stub.RollbackAlias, rollback)) == "alias_not_found"
    await client.set_alias("prod", 1)
    assert await reason_of(client.call(stub.RollbackAlias, rollback)) == "no_previous_version"
    await client.set_alias("prod", 2)
    moved = await client.call(stub.RollbackAlias, rollback)
    assert (moved.version, moved.generation) == (1, 3)
    await client.call(stub.DeleteAlias, delete)
    assert await reason_of(client.resolve("billing@prod")) == "alias_not_found"
    assert await reason_of(client.call(stub.DeleteAlias, delete)) == "alias_not_found"
    assert (await client.set_alias("prod", 2, expected=0)).generation == 5
    seen: list[tuple[int, int]] = []
    token = ""
    while True:
        request = adapter_pb2.ListAliasHistoryRequest(
            adapter="billing", alias="prod", page_size=2, page_token=token
        )
        page = await client.call(stub.ListAliasHistory, request)
        assert len(page.moves) <= 2
        seen += [(move.generation, move.version) for move in page.moves]
        token = page.next_page_token
        if not token:
            break
    assert seen == [(5, 2), (4, 0), (3, 1), (2, 2), (1, 1)]


async def test_bad_aliases(client: Client) -> None:
    await client.publish(Upload.made(0))
    for alias in ("", "Prod", "1a", "a b", "sha256:x", "x" * 33, "a-"):
        assert await reason_of(client.set_alias(alias, 1)) == "bad_alias", alias
    assert await reason_of(client.set_alias("prod", 2)) == "version_not_found"
    assert await reason_of(client.set_alias("prod", 0)) == "version_not_found"
    assert await reason_of(client.set_alias("prod", 1, adapter="nobody")) == "adapter_not_found"
    for ref in (
        "",
        "Billing",
        "billing:",
        "billing:0",
        "billing:01",
        "billing@",
        "billing@sha256:1",
        "a:1:2",
    ):
        assert (await reason_of(client.resolve(ref))).startswith("bad_"), ref


async def test_deleted_versions(client: Client) -> None:
    stub = client.adapters
    for seed in range(2):
        await client.publish(Upload.made(seed))
    await client.set_alias("prod", 2)
    delete = adapter_pb2.DeleteVersionRequest(adapter="billing", version=2)
    deleted = await client.call(stub.DeleteVersion, delete)
    assert deleted.state == adapter_pb2.VERSION_STATE_DELETED
    assert deleted.HasField("delete_time")
    assert await client.call(stub.DeleteVersion, delete) == deleted
    for ref in ("billing:2", "billing@prod", f"billing@{deleted.digest}"):
        assert await reason_of(client.resolve(ref)) == "adapter_deleted"
        assert await reason_of(client.download(ref, WEIGHTS)) == "adapter_deleted"
    assert await reason_of(client.set_alias("canary", 2)) == "adapter_deleted"
    assert (await client.resolve("billing")).version == 1
    assert (await client.publish(Upload.made(2))).version == 3
    await client.call(stub.DeleteAdapter, adapter_pb2.DeleteAdapterRequest(adapter="billing"))
    assert await reason_of(client.resolve("billing")) == "adapter_deleted"
    assert await reason_of(client.resolve("billing@prod")) == "alias_not_found"
    overview = await client.call(stub.GetAdapter, adapter_pb2.GetAdapterRequest(adapter="billing"))
    assert (overview.num_versions, overview.HasField("latest_version")) == (0, False)
    assert (await client.publish(Upload.made(3))).version == 4


async def test_pages(client: Client) -> None:
    stub = client.adapters
    for name in ("alpha", "beta", "beta.two", "gamma"):
        await client.publish(Upload.made(0), adapter=name)
    names: list[str] = []
    token = ""
    while True:
        request = adapter_pb2.ListAdaptersRequest(page_size=3, page_token=token)
        page = await client.call(stub.ListAdapters, request)
        names += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            break
    assert names == ["alpha", "beta", "beta.two", "gamma"]
    request = adapter_pb2.ListAdaptersRequest(name_contains="eta")
    assert [found.name for found in (await client.call(stub.ListAdapters, request)).adapters] == [
        "beta",
        "beta.two",
    ]
    for seed in range(5):
        await client.publish(Upload.made(seed), adapter="alpha")
    await client.call(stub.DeleteVersion, adapter_pb2.DeleteVersionRequest(adapter="alpha", version=5))
    first = await client.call(
        stub.ListVersions, adapter_pb2.ListVersionsRequest(adapter="alpha", page_size=2)
    )
    assert [version.version for version in first.versions] == [6, 4]
    rest = adapter_pb2.ListVersionsRequest(adapter="alpha", page_token=first.next_page_token)
    second = await client.call(stub.ListVersions, rest)
    assert [version.version for version in second.versions] == [3, 2, 1]
    assert second.next_page_token == ""
    for size in (-1, 1001, 10**9):
        request = adapter_pb2.ListAdaptersRequest(page_size=size)
        assert await reason_of(client.call(stub.ListAdapters, request)) == "bad_page_size"
    for bad in ("x", "!!!", "AAAA", "é", "Li4vLi4v"):
        request = adapter_pb2.ListAdaptersRequest(page_token=bad)
        assert await reason_of(client.call(stub.ListAdapters, request)) == "bad_page_token", bad
    no_number = adapter_pb2.ListVersionsRequest(adapter="alpha", page_token="YWxwaGE=")
    assert await reason_of(client.call(stub.ListVersions, no_number)) == "bad_page_token"


async def test_calls_of_later_versions_say_so(client: Client) -> None:
    request = adapter_pb2.AcquireLeaseRequest(digest=FINGERPRINT.digest, holder="a", ttl_seconds=1)
    with pytest.raises(LorafleetError) as caught:
        await client.call(client.adapters.AcquireLease, request)
    assert caught.value.code is Code.UNIMPLEMENTED
    watch: Any = client.adapters.WatchAdapters(
        adapter_pb2.WatchAdaptersRequest(), metadata=(("lorafleet-tenant", "acme"),)
    )
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in watch:
            pass
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
