"""What the registry refuses leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafleet.registry.v1 import adapter_pb2
from tests.support.adapter_files import config_bytes, lora_tensors, safetensors_bytes
from tests.support.registry import (
    FINGERPRINT,
    Client,
    Place,
    Upload,
    reason_of,
    registry_client,
    sha256,
)
from tests.support.registry_fixtures import WEIGHTS, client, local, stored_keys

__all__ = ["client", "local"]


BAD_UPLOADS: dict[str, Upload] = {
    "missing_file": Upload(config_bytes(), b""),
    "not_safetensors": Upload(config_bytes(), b"PK\x03\x04" + bytes(100)),
    "bad_rank": Upload.made(0, r=0),
    "rank_mismatch": Upload.made(0, r=3),
    "rank_too_large": Upload.made(0, r=64),
    "unsupported_feature": Upload.made(0, use_qalora=True),
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
