"""Forms with files that clients upload: read part by part onto disk, then sent on.

A form is taken apart and checked to its end before anything goes to the registry, so a bad form leaves
nothing behind there; in between its files lie in unnamed temporary files, never in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO

from starlette.requests import ClientDisconnect, Request

from services.common.errors import InvalidArgument, ResourceExhausted, capped
from services.common.transport import CHUNK_BYTES
from services.gateway.errors import ClientGoneError
from services.gateway.multipart import FormData, FormPart, MultipartForm

_FIELD_LIMIT_BYTES = 32 * 1024


class ReceivedFile:
    """One file of a form: its name as the client tells it, its size and its digest."""

    def __init__(self, field: str, filename: str | None, limit_bytes: int, content: BinaryIO) -> None:
        self.filename = filename or ""
        self.size_bytes = 0
        self._field = field
        self._limit_bytes = limit_bytes
        self._content = content
        self._sha256 = hashlib.sha256()
        self._held = bytearray()

    @property
    def digest(self) -> str:
        """SHA-256 of the content, as the registry writes it."""
        return f"sha256:{self._sha256.hexdigest()}"

    async def write(self, data: bytes) -> None:
        """Take bytes that have come; raise `ResourceExhausted` (`too_large`) as soon as they are too many."""
        self.size_bytes += len(data)
        if self.size_bytes > self._limit_bytes:
            raise too_large(self._field, self._limit_bytes)
        self._sha256.update(data)
        self._held += data
        if len(self._held) >= CHUNK_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Write what is held in memory to the disk."""
        await asyncio.to_thread(self._content.write, bytes(self._held))
        self._held.clear()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the content from its beginning."""
        await asyncio.to_thread(self._content.seek, 0)
        while chunk := await asyncio.to_thread(self._content.read, CHUNK_BYTES):
            yield chunk

    def read_chunks(self) -> Iterator[bytes]:
        """Yield the content from its beginning, to a thread that may wait for the disk."""
        self._content.seek(0)
        while chunk := self._content.read(CHUNK_BYTES):
            yield chunk


@dataclass(frozen=True, slots=True)
class Form:
    """A form that was read: its text fields and its files."""

    fields: dict[str, str]
    files: dict[str, ReceivedFile]

    def file(self, name: str) -> ReceivedFile:
        """Return a file; raise `InvalidArgument` (`missing_required_parameter`) where it is not there."""
        if name not in self.files:
            raise InvalidArgument("missing_required_parameter", f"{name} is required", field=name)
        return self.files[name]


class UploadSpace:
    """Room on disk for forms in progress."""

    def __init__(self, max_file_bytes: int, max_concurrent: int) -> None:
        self.max_file_bytes = max_file_bytes
        self._free = max_concurrent

    @asynccontextmanager
    async def receive(
        self, request: Request, *, files: Mapping[str, int | None], fields: Collection[str] = ()
    ) -> AsyncIterator[Form]:
        """Read the form of a request; its files are gone when the body of the `async with` ends.

        Args:
            request: whose body is the form.
            files: the fields that are files, with the most bytes of each; None for the most of any file.
            fields: the other fields that are known.

        Raises:
            InvalidArgument: `bad_form`; `unsupported_parameter`, for a field that is not known.
            ResourceExhausted: `too_large`, as soon as it is; `too_many_uploads`.
        """
        if not self._free:
            raise ResourceExhausted(
                "too_many_uploads", "too many uploads are under way", retry_after_seconds=1
            )
        self._free -= 1
        try:
            with ExitStack() as held:
                received: dict[str, ReceivedFile] = {}
                texts: dict[str, bytearray] = {}
                part: FormPart | None = None
                async for item in _form_items(request):
                    if isinstance(item, FormPart):
                        part = item
                        self._begin(part, received, texts, files, fields, held)
                    elif part is not None:
                        await _take(part.name, item.data, received, texts)
                for file in received.values():
                    await file.flush()
                yield Form({name: _decoded(name, text) for name, text in texts.items()}, received)
        finally:
            self._free += 1

    def _begin(
        self,
        part: FormPart,
        received: dict[str, ReceivedFile],
        texts: dict[str, bytearray],
        files: Mapping[str, int | None],
        fields: Collection[str],
        held: ExitStack,
    ) -> None:
        if part.name in received or part.name in texts:
            raise InvalidArgument("bad_form", f"{part.name} is given twice", field=part.name)
        if part.name in files:
            limit = files[part.name]
            content = held.enter_context(tempfile.TemporaryFile(prefix="lorafleet-upload-"))  # noqa: SIM115
            received[part.name] = ReceivedFile(
                part.name, part.filename, self.max_file_bytes if limit is None else limit, content
            )
        elif part.name in fields:
            texts[part.name] = bytearray()
        else:
            raise InvalidArgument(
                "unsupported_parameter", f"{capped(part.name, 80)} is not supported here", field=part.name
            )


def too_large(field: str, limit_bytes: int) -> ResourceExhausted:
    """Return the error for a file of more than `limit_bytes`."""
    return ResourceExhausted(
        "too_large", f"{field} is larger than {limit_bytes} bytes", field=field, limit=limit_bytes, final=True
    )


async def _take(
    name: str, data: bytes, received: dict[str, ReceivedFile], texts: dict[str, bytearray]
) -> None:
    if name in received:
        await received[name].write(data)
        return
    texts[name] += data
    if len(texts[name]) > _FIELD_LIMIT_BYTES:
        raise InvalidArgument("bad_form", f"{name} is too long", field=name)


async def _form_items(request: Request) -> AsyncIterator[FormPart | FormData]:
    form = MultipartForm(request.headers.get("content-type", ""))
    try:
        async for chunk in request.stream():
            for item in form.feed(chunk):
                yield item
    except ClientDisconnect as error:
        raise ClientGoneError from error
    form.finish()


def _decoded(name: str, text: bytearray) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument("bad_form", f"{name} is not UTF-8", field=name) from error
