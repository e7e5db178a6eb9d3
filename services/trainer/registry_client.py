"""What the trainer asks of the registry: bases, files, and the publishing of versions."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc

from lorafleet.registry.v1 import adapter_pb2, base_model_pb2, file_pb2
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceStub
from lorafleet.registry.v1.file_pb2_grpc import FileServiceStub
from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.common.channels import open_channel
from services.common.errors import DataLoss, NotFound, ResourceExhausted
from services.common.status import from_rpc_error
from services.common.tls import PeerTls
from services.trainer.bases import TrainableBase

CHUNK_BYTES = 512 * 1024
TRANSFER_SECONDS = 600.0
_IDEMPOTENT = (
    "lorafleet.registry.v1.BaseModelService/CreateBaseModel",
    "lorafleet.registry.v1.BaseModelService/GetBaseModel",
    "lorafleet.registry.v1.FileService/GetFile",
)


class RegistryClient:
    """Calls the registry for the tenant of the present call scope; its errors come as ours."""

    def __init__(self, target: str, tls: PeerTls | None = None) -> None:
        self._channel = open_channel(target, idempotent_methods=_IDEMPOTENT, tls=tls)
        self._bases = BaseModelServiceStub(self._channel)
        self._files = FileServiceStub(self._channel)
        self._adapters = AdapterServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def create_base(self, base: TrainableBase) -> None:
        """Make a base known; nothing changes where it is known already.

        Raises:
            AlreadyExists: `base_exists`, where its name stands for another base.
        """
        request = base_model_pb2.CreateBaseModelRequest(base_model=base.record)
        try:
            await self._bases.CreateBaseModel(request)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def file(self, file_id: str) -> file_pb2.File:
        """Return a file's description; raise `NotFound` (`file_not_found`) where there is none."""
        try:
            return await self._files.GetFile(file_pb2.GetFileRequest(file_id=file_id))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def download(self, file_id: str, path: Path, *, max_bytes: int) -> None:
        """Write the bytes of a file to `path`.

        Raises:
            NotFound: `file_not_found`.
            ResourceExhausted: `dataset_too_large`, above `max_bytes`.
            DataLoss: `corrupt_blob`, where the bytes are not the file's.
        """
        file = await self.file(file_id)
        if file.size_bytes > max_bytes:
            raise ResourceExhausted(
                "dataset_too_large",
                f"file {file_id} has {file.size_bytes:,} bytes; at most {max_bytes:,} can be trained on",
                value=file.size_bytes,
                limit=max_bytes,
                final=True,
            )
        digest = hashlib.sha256()
        request = file_pb2.DownloadFileRequest(file_id=file_id)
        try:
            with path.open("wb") as out:
                async for piece in self._files.DownloadFile(request, timeout=TRANSFER_SECONDS):
                    digest.update(piece.data)
                    out.write(piece.data)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        if "sha256:" + digest.hexdigest() != file.digest:
            raise DataLoss("corrupt_blob", f"the bytes of file {file_id} are not what was stored")

    async def download_head(self, file_id: str, num_bytes: int) -> bytes:
        """Return the first `num_bytes` of a file, fewer where it is shorter."""
        request = file_pb2.DownloadFileRequest(file_id=file_id, length=num_bytes)
        try:
            pieces = [
                piece.data async for piece in self._files.DownloadFile(request, timeout=TRANSFER_SECONDS)
            ]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return b"".join(pieces)

    async def create_result_file(self, filename: str, data: bytes) -> str:
        """Store a job's result file and return its id."""

        async def requests() -> AsyncIterator[file_pb2.CreateFileRequest]:
            header = file_pb2.CreateFileHeader(
                filename=filename, purpose=file_pb2.FilePurpose.FILE_PURPOSE_FINE_TUNE_RESULTS
            )
            yield file_pb2.CreateFileRequest(header=header)
            for start in range(0, len(data), CHUNK_BYTES):
                yield file_pb2.CreateFileRequest(data=data[start : start + CHUNK_BYTES])

        try:
            return (await self._files.CreateFile(requests(), timeout=TRANSFER_SECONDS)).id
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def publish(
        self,
        folder: Path,
        *,
        adapter: str,
        base_fingerprint_digest: str,
        card: adapter_pb2.ModelCard,
        idempotency_key: str,
    ) -> adapter_pb2.AdapterVersion:
        """Publish the adapter files in `folder` as a version; the same key gives the first version again."""
        paths = [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
        header = adapter_pb2.PublishVersionHeader(
            adapter=adapter,
            base_fingerprint_digest=base_fingerprint_digest,
            files=[_described(path) for path in paths],
            card=card,
            idempotency_key=idempotency_key,
        )

        async def requests() -> AsyncIterator[adapter_pb2.PublishVersionRequest]:
            yield adapter_pb2.PublishVersionRequest(header=header)
            for chunk in _chunks(paths):
                yield adapter_pb2.PublishVersionRequest(chunk=chunk)

        try:
            return await self._adapters.PublishVersion(requests(), timeout=TRANSFER_SECONDS)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def delete_adapter(self, adapter: str) -> None:
        """Delete an adapter with its versions; no error where there is none."""
        try:
            await self._adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(adapter=adapter))
        except grpc.RpcError as error:
            reason = from_rpc_error(error)
            if not isinstance(reason, NotFound):
                raise reason from error


def _described(path: Path) -> adapter_pb2.AdapterFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return adapter_pb2.AdapterFile(name=path.name, digest=f"sha256:{digest}", size_bytes=path.stat().st_size)


def _chunks(paths: Sequence[Path]) -> Iterator[adapter_pb2.FileChunk]:
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                yield adapter_pb2.FileChunk(file=path.name, data=data)
