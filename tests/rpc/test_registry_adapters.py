"""Versions through the real registry: publish, resolve, download, list; tenants; idempotency."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lorafleet.registry.v1 import adapter_pb2, file_pb2
from services.common.errors import Code, LorafleetError
from services.common.store import DirectoryStore
from tests.support.registry import (
    FINGERPRINT,
    Client,
    Place,
    Upload,
    reason_of,
    registry_client,
    sha256,
)
from tests.support.registry_fixtures import (
    CONFIG,
    WEIGHTS,
    client,
    local,
    place,
    s3_server,
    stored_keys,
)

__all__ = ["client", "local", "place", "s3_server"]


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


async def test_row_37_a_publication_is_repeated_by_its_key(client: Client) -> None:
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


async def test_row_37_two_at_once_with_one_key_make_one_version(client: Client) -> None:
    published = await asyncio.gather(*(client.publish(Upload.made(0), key="same") for _ in range(8)))
    assert {version.version for version in published} == {1}
    assert await reason_of(client.resolve("billing:2")) == "version_not_found"


async def test_row_42_another_tenant_sees_nothing(client: Client) -> None:
    mine = await client.publish(Upload.made(0), key="k")
    await client.set_alias("prod", 1)
    file = await client.create_file(b"secret")
    other = client.as_tenant("rival")

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


async def test_row_43_knowing_a_digest_saves_no_upload(client: Client) -> None:
    """Neither with a file nor with an adapter does a tenant learn that another one has the same bytes."""
    mine = Upload.made(0)
    await client.publish(mine)
    await client.create_file(mine.weights)
    rival = client.as_tenant("rival")
    for upload in (mine, Upload.made(1)):
        header = upload.header()
        for messages in ([], list(upload.requests(header))[1:-1]):
            stream = iter([adapter_pb2.PublishVersionRequest(header=header), *messages])
            with pytest.raises(LorafleetError) as refused:
                await rival.call(rival.adapters.PublishVersion, stream)
            assert refused.value.reason == "digest_mismatch"
        announced = file_pb2.CreateFileHeader(
            filename="a", purpose=file_pb2.FILE_PURPOSE_FINE_TUNE, digest=sha256(upload.weights)
        )
        start = file_pb2.StartUploadRequest(header=announced, size_bytes=len(upload.weights))
        session = await rival.call(rival.files.StartUpload, start)
        assert session.committed_bytes == 0
        complete = file_pb2.CompleteUploadRequest(upload_id=session.id)
        assert await reason_of(rival.call(rival.files.CompleteUpload, complete)) == "upload_incomplete"


async def test_row_38_a_record_without_its_bytes_is_not_made(client: Client, tmp_path: Path) -> None:
    """The bytes come with their announcement; one that names others, or none, makes nothing visible."""
    upload = Upload.made(0)
    stored = (await client.create_file(upload.weights)).digest
    before = stored_keys(tmp_path)
    header = upload.header()
    assert header.files[1].digest == stored
    for stream in ([], list(upload.requests(header))[1:2]):
        call = client.call(
            client.adapters.PublishVersion, iter([adapter_pb2.PublishVersionRequest(header=header), *stream])
        )
        assert await reason_of(call) == "digest_mismatch"
    assert await reason_of(client.resolve("billing")) == "adapter_not_found"
    assert stored_keys(tmp_path) == before


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
