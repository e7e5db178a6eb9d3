"""FileService."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from lorafleet.registry.v1 import file_pb2, file_pb2_grpc
from services.common.call_context import current_tenant
from services.common.errors import InvalidArgument
from services.registry import convert, paging
from services.registry.blobs import Blobs, Upload
from services.registry.config import RegistryLimits
from services.registry.files import Files
from services.registry.servicers.chunks import check_chunk, length_or_all
from services.registry.uninterrupted import in_thread


class FileServicer(file_pb2_grpc.FileServiceServicer):
    """Keeps and serves files for the tenant of the call."""

    def __init__(self, files: Files, blobs: Blobs, limits: RegistryLimits, scratch_dir: Path | None) -> None:
        self._files = files
        self._blobs = blobs
        self._limits = limits
        self._scratch_dir = scratch_dir

    async def CreateFile(  # noqa: N802
        self,
        request_iterator: AsyncIterator[file_pb2.CreateFileRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> file_pb2.File:
        """See file.proto."""
        tenant = current_tenant()
        filename, purpose, declared_digest = convert.file_header(await _header(request_iterator))
        with tempfile.TemporaryDirectory(prefix="lorafleet-file-", dir=self._scratch_dir) as folder:
            path = Path(folder) / "data"
            upload = Upload(path, max_bytes=self._limits.max_file_bytes, field="data")
            with contextlib.closing(upload):
                async for request in request_iterator:
                    if request.WhichOneof("message") != "data":
                        raise InvalidArgument(
                            "bad_stream", "After the header only bytes may follow.", field="message"
                        )
                    check_chunk(request.data)
                    await in_thread(upload.write, request.data)
                await in_thread(upload.finish)
                record = await self._files.create(
                    tenant, filename, purpose, upload, declared_digest=declared_digest
                )
        return convert.file_to_message(record)

    async def GetFile(  # noqa: N802
        self, request: file_pb2.GetFileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.File:
        """See file.proto."""
        return convert.file_to_message(await self._files.get(current_tenant(), request.file_id))

    async def ListFiles(  # noqa: N802
        self, request: file_pb2.ListFilesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.ListFilesResponse:
        """See file.proto."""
        records, more = await self._files.page(
            current_tenant(),
            paging.position(request.page_token),
            paging.page_size(request.page_size),
            convert.purpose_filter(request.purpose),
        )
        return file_pb2.ListFilesResponse(
            files=[convert.file_to_message(record) for record in records],
            next_page_token=paging.token_after(records[-1].id) if more else "",
        )

    async def DownloadFile(  # noqa: N802
        self, request: file_pb2.DownloadFileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[file_pb2.DownloadFileResponse]:
        """See file.proto."""
        record = await self._files.get(current_tenant(), request.file_id)
        pieces = self._blobs.stream(
            record.digest,
            size_bytes=record.size_bytes,
            offset=request.offset,
            length=length_or_all(request.length),
        )
        async with contextlib.aclosing(pieces):
            async for offset, data in pieces:
                yield file_pb2.DownloadFileResponse(offset=offset, data=data)

    async def DeleteFile(  # noqa: N802
        self, request: file_pb2.DeleteFileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.DeleteFileResponse:
        """See file.proto."""
        await self._files.delete(current_tenant(), request.file_id)
        return file_pb2.DeleteFileResponse()


async def _header(requests: AsyncIterator[file_pb2.CreateFileRequest]) -> file_pb2.CreateFileHeader:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("message") != "header":
        raise InvalidArgument("bad_stream", "The first message must be the header.", field="message")
    return first.header
