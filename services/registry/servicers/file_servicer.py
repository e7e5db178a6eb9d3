"""FileService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lorafleet.registry.v1 import file_pb2, file_pb2_grpc
from services.common.call_context import current_tenant
from services.common.errors import InvalidArgument
from services.registry import convert, paging
from services.registry.blobs import Blobs, Upload
from services.registry.config import RegistryLimits
from services.registry.files import Files
from services.registry.scratch import Scratch
from services.registry.servicers.chunks import check_chunk, length_or_all
from services.registry.token_secret import TokenSource
from services.registry.transfers import Transfers
from services.registry.uninterrupted import in_thread
from services.registry.uploads import Uploads, checked_digest


class FileServicer(file_pb2_grpc.FileServiceServicer):
    """Keeps and serves files for the tenant of the call."""

    def __init__(
        self,
        files: Files,
        uploads: Uploads,
        blobs: Blobs,
        tokens: TokenSource,
        limits: RegistryLimits,
        scratch: Scratch,
        transfers: Transfers,
    ) -> None:
        self._files = files
        self._uploads = uploads
        self._blobs = blobs
        self._tokens = tokens
        self._limits = limits
        self._scratch = scratch
        self._transfers = transfers

    async def CreateFile(  # noqa: N802
        self,
        request_iterator: AsyncIterator[file_pb2.CreateFileRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> file_pb2.File:
        """See file.proto."""
        tenant = current_tenant()
        filename, purpose, declared_digest = convert.file_header(await _header(request_iterator))
        with self._scratch.folder() as folder:
            upload = Upload(folder / "data", max_bytes=self._limits.max_file_bytes, field="data")
            with contextlib.closing(upload):
                async with contextlib.aclosing(self._transfers.incoming(request_iterator)) as requests:
                    async for request in requests:
                        if request.WhichOneof("message") != "data":
                            raise InvalidArgument(
                                "bad_stream", "After the header only bytes may follow.", field="message"
                            )
                        check_chunk(request.data)
                        await in_thread(upload.write, request.data)
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
        tokens, tenant = await self._tokens.get(), current_tenant()
        scope = (tenant, "files", str(request.purpose))
        records, more = await self._files.page(
            tenant,
            tokens.position(request.page_token, *scope),
            paging.page_size(request.page_size),
            convert.purpose_filter(request.purpose),
        )
        return file_pb2.ListFilesResponse(
            files=[convert.file_to_message(record) for record in records],
            next_page_token=tokens.after(records[-1].id, *scope) if more else "",
        )

    async def DownloadFile(  # noqa: N802
        self, request: file_pb2.DownloadFileRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[file_pb2.DownloadFileResponse]:
        """See file.proto."""
        record = await self._files.get(current_tenant(), request.file_id)
        pieces = self._transfers.outgoing(
            self._blobs.stream(
                record.digest,
                size_bytes=record.size_bytes,
                offset=request.offset,
                length=length_or_all(request.length),
            )
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

    async def StartUpload(  # noqa: N802
        self, request: file_pb2.StartUploadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.Upload:
        """See file.proto."""
        filename, purpose, digest = convert.file_header(request.header)
        session = await self._uploads.start(
            current_tenant(), filename, purpose, digest=digest, size_bytes=request.size_bytes
        )
        return convert.upload_to_message(session, 0)

    async def AppendUpload(  # noqa: N802
        self,
        request_iterator: AsyncIterator[file_pb2.AppendUploadRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> file_pb2.Upload:
        """See file.proto."""
        first = await anext(request_iterator, None)
        if first is None:
            raise InvalidArgument("bad_stream", "At least one message must come.", field="message")
        async with self._uploads.appending(current_tenant(), first.upload_id) as appender:
            check_chunk(first.data)
            await appender.add(first.offset, first.data)
            async with contextlib.aclosing(self._transfers.incoming(request_iterator)) as requests:
                async for request in requests:
                    if request.upload_id not in ("", first.upload_id):
                        raise InvalidArgument("bad_stream", "A stream serves one upload.", field="upload_id")
                    check_chunk(request.data)
                    await appender.add(request.offset, request.data)
            await appender.commit()
            return convert.upload_to_message(appender.session, appender.committed_bytes)

    async def GetUpload(  # noqa: N802
        self, request: file_pb2.GetUploadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.Upload:
        """See file.proto."""
        return convert.upload_to_message(*await self._uploads.get(current_tenant(), request.upload_id))

    async def CompleteUpload(  # noqa: N802
        self, request: file_pb2.CompleteUploadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.File:
        """See file.proto."""
        digest = checked_digest(request.digest)
        return convert.file_to_message(
            await self._uploads.complete(current_tenant(), request.upload_id, digest)
        )

    async def CancelUpload(  # noqa: N802
        self, request: file_pb2.CancelUploadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> file_pb2.CancelUploadResponse:
        """See file.proto."""
        await self._uploads.cancel(current_tenant(), request.upload_id)
        return file_pb2.CancelUploadResponse()


async def _header(requests: AsyncIterator[file_pb2.CreateFileRequest]) -> file_pb2.CreateFileHeader:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("message") != "header":
        raise InvalidArgument("bad_stream", "The first message must be the header.", field="message")
    return first.header
