"""Adapters: publish, fetch, name, move aliases, take back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from lorafleet.client.connection import AnswerT, Connection
from lorafleet.inference.v1 import inference_service_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import adapter_pb2 as messages
from lorafleet.registry.v1 import base_model_pb2
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceStub
from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.common.errors import DataLoss, NotFound

_CHUNK_BYTES = 512 * 1024


class AsyncAdapters:
    """A tenant's adapters. A `ref` is `name`, `name:3`, `name@prod` or `name@sha256:...`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = AdapterServiceStub(connection.channel)
        self._bases = BaseModelServiceStub(connection.channel)
        self._inference = InferenceServiceStub(connection.channel)

    async def all(self, *, name_contains: str = "") -> list[messages.Adapter]:
        """Return every adapter whose name contains the text, by name."""
        request = messages.ListAdaptersRequest(name_contains=name_contains)
        pages = self._connection.pages(self._stub.ListAdapters, request, messages.ListAdaptersResponse)
        return [adapter async for page in pages for adapter in page.adapters]

    async def get(self, name: str) -> messages.Adapter:
        """Return one adapter; raise `NotFound` (`adapter_not_found`) where there is none."""
        return await self._call(
            self._stub.GetAdapter, messages.GetAdapterRequest(adapter=name), messages.Adapter
        )

    async def versions(self, name: str) -> list[messages.AdapterVersion]:
        """Return an adapter's versions that are not deleted, newest first."""
        request = messages.ListVersionsRequest(adapter=name)
        pages = self._connection.pages(self._stub.ListVersions, request, messages.ListVersionsResponse)
        return [version async for page in pages for version in page.versions]

    async def resolve(self, ref: str) -> messages.AdapterVersion:
        """Return the version that a reference names now.

        Raises:
            NotFound: `adapter_not_found`, `version_not_found`, `alias_not_found` or `adapter_deleted`.
        """
        return await self._call(
            self._stub.ResolveVersion, messages.ResolveVersionRequest(ref=ref), messages.AdapterVersion
        )

    async def push(
        self, name: str, folder: Path, *, base: str = "", description: str = "", idempotency_key: str = ""
    ) -> messages.AdapterVersion:
        """Publish the PEFT adapter in `folder` as the next version of `name`.

        Args:
            folder: holds `adapter_config.json` and `adapter_model.safetensors`; nothing else is read.
            base: name of the base that it was trained on; empty: the one that is served.
            idempotency_key: the same key with the same content gives the first version again.

        Raises:
            NotFound: `missing_file`, or `base_not_found`.
            InvalidArgument: what is wrong with the files; see `PublishVersion` in the contract.
        """
        paths = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
        for path in paths:
            if not path.is_file():
                raise NotFound("missing_file", f"{folder} has no {path.name}", field="folder")
        header = messages.PublishVersionHeader(
            adapter=name,
            base_fingerprint_digest=await self._base_digest(base),
            files=[_described(path) for path in paths],
            card=messages.ModelCard(description=description, base_model=base),
            idempotency_key=idempotency_key,
        )
        return await self._call(
            self._stub.PublishVersion, _publication(header, paths), messages.AdapterVersion
        )

    async def pull(self, ref: str, folder: Path) -> messages.AdapterVersion:
        """Write a version's two files to `folder`, checked, as plain PEFT reads them.

        Raises:
            NotFound: as `resolve`.
            DataLoss: `corrupt_blob`; a file that is there before stays as it was.
        """
        version = await self.resolve(ref)
        pinned = f"{version.adapter}@{version.digest}"
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        for file in version.files:
            request = messages.DownloadVersionRequest(ref=pinned, file=file.name)
            target = _CheckedFile(folder / file.name)
            async for piece in self._connection.stream(self._stub.DownloadVersion, request):
                await asyncio.to_thread(target.write, piece.data)
            await asyncio.to_thread(target.finish, file.digest)
        return version

    async def delete(self, name: str, version: int | None = None) -> None:
        """Delete a version, or with None the adapter with all versions and aliases."""
        if version is None:
            await self._call(
                self._stub.DeleteAdapter,
                messages.DeleteAdapterRequest(adapter=name),
                messages.DeleteAdapterResponse,
            )
        else:
            request = messages.DeleteVersionRequest(adapter=name, version=version)
            await self._call(self._stub.DeleteVersion, request, messages.AdapterVersion)

    async def set_alias(
        self, name: str, alias: str, version: int, *, expected_generation: int | None = None
    ) -> messages.Alias:
        """Create or move an alias.

        Raises:
            Aborted: `alias_conflict`, where it is not at `expected_generation` (0: it must not exist).
        """
        request = messages.SetAliasRequest(
            adapter=name, alias=alias, version=version, expected_generation=expected_generation
        )
        return await self._call(self._stub.SetAlias, request, messages.Alias)

    async def rollback(self, name: str, alias: str) -> messages.Alias:
        """Move an alias back to where it pointed before its last move.

        Raises:
            FailedPrecondition: `no_previous_version`.
        """
        return await self._call(
            self._stub.RollbackAlias, messages.RollbackAliasRequest(adapter=name, alias=alias), messages.Alias
        )

    async def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias; its history stays."""
        await self._call(
            self._stub.DeleteAlias,
            messages.DeleteAliasRequest(adapter=name, alias=alias),
            messages.DeleteAliasResponse,
        )

    async def alias_history(self, name: str, alias: str) -> list[messages.Alias]:
        """Return every move of an alias, newest first."""
        request = messages.ListAliasHistoryRequest(adapter=name, alias=alias, page_size=1000)
        pages = self._connection.pages(
            self._stub.ListAliasHistory, request, messages.ListAliasHistoryResponse
        )
        return [move async for page in pages for move in page.moves]

    async def _base_digest(self, base: str) -> str:
        if base:
            request = base_model_pb2.GetBaseModelRequest(name=base)
            record = await self._call(self._bases.GetBaseModel, request, base_model_pb2.BaseModel)
            return str(record.fingerprint.digest)
        status = await self._call(
            self._inference.GetStatus,
            inference_service_pb2.GetStatusRequest(),
            inference_service_pb2.EngineStatus,
        )
        return str(status.base_fingerprint_digest)

    async def _call(self, method: Any, request: Any, answer: type[AnswerT]) -> AnswerT:
        return await self._connection.call(method, request, answer)


def _described(path: Path) -> messages.AdapterFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return messages.AdapterFile(name=path.name, digest=f"sha256:{digest}", size_bytes=path.stat().st_size)


async def _publication(
    header: messages.PublishVersionHeader, paths: list[Path]
) -> AsyncIterator[messages.PublishVersionRequest]:
    yield messages.PublishVersionRequest(header=header)
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(_CHUNK_BYTES):
                yield messages.PublishVersionRequest(chunk=messages.FileChunk(file=path.name, data=data))


class _CheckedFile:
    """A file that takes its name once its bytes are known to be right."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._digest = hashlib.sha256()
        self._file = self._partial.open("wb")

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._digest.update(data)
        self._file.write(data)

    def finish(self, digest: str) -> None:
        """Give the file its name; raise `DataLoss` (`corrupt_blob`) where its digest is another."""
        self._file.close()
        if f"sha256:{self._digest.hexdigest()}" != digest:
            self._partial.unlink()
            raise DataLoss("corrupt_blob", f"the bytes of {self._path.name} are not what was published")
        self._partial.replace(self._path)
