"""A real registry on a free port, and the calls that its clients make."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from pydantic import SecretStr

from lorafleet.registry.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    base_model_pb2,
    base_model_pb2_grpc,
    file_pb2,
    file_pb2_grpc,
)
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.errors import LorafleetError
from services.common.fingerprint import BaseFingerprint, ComputeDtype, Quantization, QuantizationType
from services.common.server import ServiceHost
from services.common.status import from_rpc_error
from services.registry.config import RegistrySettings
from services.registry.service import SERVICES, Registry
from tests.support.adapter_files import (
    IN_FEATURES,
    MODULE,
    OUT_FEATURES,
    config_bytes,
    lora_tensors,
    safetensors_bytes,
)
from tests.support.s3_server import S3Server

CHUNK_BYTES = 37
BASE_NAME = "tiny"


def sha256(data: bytes) -> str:
    """The digest of `data`, as the registry writes it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


FINGERPRINT = BaseFingerprint(
    weights_digest=sha256(b"weights"),
    config_digest=sha256(b"config"),
    tokenizer_digest=sha256(b"tokenizer"),
    chat_template_digest=sha256(b""),
    quantization=Quantization(QuantizationType.NF4, 64, True, ComputeDtype.BFLOAT16),
)


def base_message(
    name: str = BASE_NAME, fingerprint: BaseFingerprint = FINGERPRINT
) -> base_model_pb2.BaseModel:
    """A base with the one layer that the adapters of `tests.support.adapter_files` are for."""
    return base_model_pb2.BaseModel(
        name=name,
        fingerprint=base_model_pb2.Fingerprint(
            weights_digest=fingerprint.weights_digest,
            config_digest=fingerprint.config_digest,
            tokenizer_digest=fingerprint.tokenizer_digest,
            chat_template_digest=fingerprint.chat_template_digest,
            quantization=base_model_pb2.Quantization(
                type=base_model_pb2.QUANTIZATION_TYPE_NF4,
                block_size=64,
                double_quantization=True,
                compute_dtype=fingerprint.quantization.compute_dtype.value,
            ),
            digest=fingerprint.digest,
        ),
        architecture="LlamaForCausalLM",
        hidden_size=IN_FEATURES,
        num_layers=1,
        vocab_size=16,
        max_model_len=64,
        num_parameters=1000,
        linear_modules=[
            base_model_pb2.LinearModule(name=MODULE, in_features=IN_FEATURES, out_features=OUT_FEATURES)
        ],
    )


@dataclass(frozen=True, slots=True)
class Upload:
    """The two files of an adapter."""

    config: bytes
    weights: bytes

    @classmethod
    def made(cls, seed: int = 0, **config: object) -> Upload:
        """A valid adapter; different for each seed."""
        return cls(config_bytes(**config), safetensors_bytes(lora_tensors(seed=seed)))

    def header(
        self, adapter: str = "billing", *, base_digest: str = FINGERPRINT.digest, key: str = "", **card: Any
    ) -> adapter_pb2.PublishVersionHeader:
        """The header that announces both files."""
        return adapter_pb2.PublishVersionHeader(
            adapter=adapter,
            base_fingerprint_digest=base_digest,
            files=[
                adapter_pb2.AdapterFile(name=name, digest=sha256(data), size_bytes=len(data))
                for name, data in self.files()
            ],
            card=adapter_pb2.ModelCard(**card),
            idempotency_key=key,
        )

    def files(self) -> list[tuple[str, bytes]]:
        """Names and bytes."""
        return [("adapter_config.json", self.config), ("adapter_model.safetensors", self.weights)]

    def requests(
        self, header: adapter_pb2.PublishVersionHeader
    ) -> Iterator[adapter_pb2.PublishVersionRequest]:
        """The messages of a publication: the header, then small chunks of both files in turn."""
        yield adapter_pb2.PublishVersionRequest(header=header)
        longest = max(len(self.config), len(self.weights))
        for start in range(0, longest, CHUNK_BYTES):
            for name, data in self.files():
                if chunk := data[start : start + CHUNK_BYTES]:
                    message = adapter_pb2.FileChunk(file=name, data=chunk)
                    yield adapter_pb2.PublishVersionRequest(chunk=message)


class Client:
    """The registry as one tenant sees it; errors come as `LorafleetError`."""

    def __init__(self, channel: grpc.aio.Channel, tenant: str) -> None:
        self.tenant = tenant
        self._channel = channel
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.bases = base_model_pb2_grpc.BaseModelServiceStub(channel)
        self.files = file_pb2_grpc.FileServiceStub(channel)

    def as_tenant(self, tenant: str) -> Client:
        """The same registry, as another tenant sees it."""
        return Client(self._channel, tenant)

    async def call(self, method: Any, request: Any) -> Any:
        """Make a call with one answer."""
        try:
            with call_scope(tenant=self.tenant):
                return await method(request, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def publish(
        self, upload: Upload, header: adapter_pb2.PublishVersionHeader | None = None, **options: Any
    ) -> adapter_pb2.AdapterVersion:
        """Publish a version."""
        header = upload.header(**options) if header is None else header
        result: adapter_pb2.AdapterVersion = await self.call(
            self.adapters.PublishVersion, upload.requests(header)
        )
        return result

    async def resolve(self, ref: str) -> adapter_pb2.AdapterVersion:
        """Resolve a reference."""
        request = adapter_pb2.ResolveVersionRequest(ref=ref)
        result: adapter_pb2.AdapterVersion = await self.call(self.adapters.ResolveVersion, request)
        return result

    async def download(self, ref: str, file: str, *, offset: int = 0, length: int = 0) -> bytes:
        """Download one file of a version."""
        request = adapter_pb2.DownloadVersionRequest(ref=ref, file=file, offset=offset, length=length)
        return await self._collect(self.adapters.DownloadVersion, request, offset)

    async def create_file(
        self, data: bytes, filename: str = "train.jsonl", *, digest: str = "", purpose: int = 1
    ) -> file_pb2.File:
        """Upload a file."""

        def requests() -> Iterator[file_pb2.CreateFileRequest]:
            header = file_pb2.CreateFileHeader(filename=filename, purpose=purpose, digest=digest)  # type: ignore[arg-type]
            yield file_pb2.CreateFileRequest(header=header)
            for start in range(0, len(data), CHUNK_BYTES):
                yield file_pb2.CreateFileRequest(data=data[start : start + CHUNK_BYTES])

        result: file_pb2.File = await self.call(self.files.CreateFile, requests())
        return result

    async def download_file(self, file_id: str, *, offset: int = 0, length: int = 0) -> bytes:
        """Download a file."""
        request = file_pb2.DownloadFileRequest(file_id=file_id, offset=offset, length=length)
        return await self._collect(self.files.DownloadFile, request, offset)

    async def set_alias(
        self, alias: str, version: int, *, expected: int | None = None, adapter: str = "billing"
    ) -> adapter_pb2.Alias:
        """Set an alias."""
        request = adapter_pb2.SetAliasRequest(
            adapter=adapter, alias=alias, version=version, expected_generation=expected
        )
        result: adapter_pb2.Alias = await self.call(self.adapters.SetAlias, request)
        return result

    async def _collect(self, method: Any, request: Any, offset: int) -> bytes:
        data = b""
        try:
            with call_scope(tenant=self.tenant):
                async for response in method(request, timeout=30):
                    assert response.offset == offset + len(data)
                    data += response.data
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return data


@dataclass(frozen=True, slots=True)
class Place:
    """Where a registry keeps its things; `None` for the S3 keys means a directory."""

    redis_url: str
    store_url: str
    access_key: str | None = None
    secret_key: str | None = None

    @classmethod
    def in_directory(cls, redis_url: str, folder: Path) -> Place:
        """Objects in a directory."""
        return cls(redis_url, f"file://{folder}")

    @classmethod
    def in_s3(cls, redis_url: str, server: S3Server, bucket: str) -> Place:
        """Objects in a bucket."""
        return cls(redis_url, server.store_url(bucket), server.access_key, server.secret_key)

    def settings(self, **changes: Any) -> RegistrySettings:
        """The settings of a registry here."""
        values: dict[str, Any] = {"redis_url": SecretStr(self.redis_url), "store_url": self.store_url}
        if self.access_key and self.secret_key:
            values["store_access_key"] = SecretStr(self.access_key)
            values["store_secret_key"] = SecretStr(self.secret_key)
        return RegistrySettings(**(values | changes))


@asynccontextmanager
async def running_registry(place: Place, **changes: Any) -> AsyncIterator[grpc.aio.Channel]:
    """Run a registry; yield a channel to it."""
    settings = place.settings(**changes)
    host = ServiceHost(settings, SERVICES)
    registry = Registry(settings)
    await registry.register(host)
    try:
        await registry.probe()
        address = await host.start()
        async with open_channel(str(address)) as channel:
            yield channel
    finally:
        await host.stop(grace_seconds=0)


@asynccontextmanager
async def registry_client(place: Place, *, tenant: str = "acme", **changes: Any) -> AsyncIterator[Client]:
    """Run a registry with the base `tiny` in it; yield a client."""
    async with running_registry(place, **changes) as channel:
        client = Client(channel, tenant)
        request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
        await client.call(client.bases.CreateBaseModel, request)
        yield client


def other_fingerprint(**changes: Any) -> BaseFingerprint:
    """`FINGERPRINT` with changes."""
    return replace(FINGERPRINT, **changes)


async def reason_of(call: Any) -> str:
    """The reason that awaiting `call` fails with."""
    try:
        await call
    except LorafleetError as error:
        return error.reason
    return "no error"
