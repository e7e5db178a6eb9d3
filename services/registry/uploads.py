"""Resumable uploads: a session, parts at committed offsets, and one file at the end.

A session and its parts are objects, so an upload outlives the registry that began it:

    uploads/sessions/<tenant>/<upload id>.json
    uploads/parts/<tenant>/<upload id>/<offset>-<size>

Each part is durable before its bytes count as committed. The file gets the id of its upload, so completing
twice makes one file.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from services.common import ids, names
from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from services.common.failpoints import failpoint
from services.common.store import ObjectNotFoundError, ObjectStore
from services.registry.blobs import Upload, too_large
from services.registry.clock import now_ms
from services.registry.config import RegistryLimits
from services.registry.files import Files, digest_mismatch
from services.registry.records import Codec, FilePurpose, FileRecord
from services.registry.scratch import Scratch
from services.registry.uninterrupted import in_thread
from services.registry.usage import Usage

ID_PREFIX = "upload"
PART_BYTES = 1024 * 1024
_SESSIONS = "uploads/sessions/"
_PARTS = "uploads/parts/"


@dataclass(frozen=True, slots=True)
class UploadSession:
    """What was announced when an upload began. `digest` may be empty."""

    tenant: str
    id: str
    filename: str
    purpose: FilePurpose
    digest: str
    size_bytes: int
    expire_time_ms: int

    @property
    def file_id(self) -> str:
        """The id of the file that this upload becomes."""
        return "file-" + self.id.removeprefix(ID_PREFIX + "-")


_SESSION_CODEC = Codec(UploadSession)


class Uploads:
    """The open uploads of all tenants; each call acts for one."""

    def __init__(
        self, store: ObjectStore, files: Files, usage: Usage, limits: RegistryLimits, scratch: Scratch
    ) -> None:
        self._store = store
        self._files = files
        self._usage = usage
        self._limits = limits
        self._scratch = scratch
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def start(
        self, tenant: str, filename: str, purpose: FilePurpose, *, digest: str, size_bytes: int
    ) -> UploadSession:
        """Open an upload of `size_bytes` bytes.

        Raises:
            InvalidArgument: `empty_file`.
            ResourceExhausted: `too_large`, `quota_exceeded` or `too_many_uploads`.
        """
        if size_bytes == 0:
            raise InvalidArgument("empty_file", "The file holds no bytes.", field="size_bytes")
        if size_bytes > self._limits.max_file_bytes:
            raise too_large("size_bytes", size_bytes, self._limits.max_file_bytes)
        await self._usage.check_room(None, tenant, size_bytes)
        session = UploadSession(
            tenant=tenant,
            id=ids.new_id(ID_PREFIX),
            filename=filename,
            purpose=purpose,
            digest=digest,
            size_bytes=size_bytes,
            expire_time_ms=now_ms() + int(self._limits.upload_seconds * 1000),
        )
        await in_thread(self._store_session, session)
        failpoint("upload.after_session")
        return session

    async def get(self, tenant: str, upload_id: str) -> tuple[UploadSession, int]:
        """Return an open upload and its committed bytes. Raises `NotFound` (`upload_not_found`)."""
        session = await in_thread(self._session, tenant, upload_id)
        return session, await in_thread(self._committed_bytes, session)

    @asynccontextmanager
    async def appending(self, tenant: str, upload_id: str) -> AsyncIterator[Appender]:
        """Hold an upload for appending; what was committed stays so however this ends.

        Raises:
            NotFound: `upload_not_found`.
        """
        async with self._lock(upload_id):
            session, committed_bytes = await self.get(tenant, upload_id)
            yield Appender(self._store, session, committed_bytes)

    async def complete(self, tenant: str, upload_id: str, digest: str) -> FileRecord:
        """Make the file of a whole upload; a second time, return it again.

        Raises:
            NotFound: `upload_not_found`.
            FailedPrecondition: `upload_incomplete`.
            InvalidArgument: `digest_mismatch`; the upload is gone then.
            ResourceExhausted: `quota_exceeded`.
        """
        async with self._lock(upload_id):
            try:
                session, committed_bytes = await self.get(tenant, upload_id)
            except NotFound:
                return await self._completed(tenant, upload_id)
            if committed_bytes != session.size_bytes:
                raise FailedPrecondition(
                    "upload_incomplete",
                    f"{committed_bytes} of {session.size_bytes} bytes have come.",
                    resource=f"uploads/{upload_id}",
                    metadata={"committed_bytes": str(committed_bytes)},
                )
            failpoint("upload.before_complete")
            with self._scratch.folder() as folder:
                record = await self._file_of(session, digest, folder)
            failpoint("upload.before_cleanup")
            await in_thread(self._remove, session.tenant, session.id)
            return record

    async def cancel(self, tenant: str, upload_id: str) -> None:
        """End an upload and free its bytes. Raises `NotFound` (`upload_not_found`)."""
        async with self._lock(upload_id):
            await self.get(tenant, upload_id)
            await in_thread(self._remove, tenant, upload_id)

    async def sweep(self) -> int:
        """Remove expired uploads and parts without a session; return how many uploads that were."""
        found = await in_thread(self._ids_to_sweep)
        for tenant, upload_id in found:
            async with self._lock(upload_id):
                failpoint("gc.before_upload")
                await in_thread(self._remove, tenant, upload_id)
        return len(found)

    async def _file_of(self, session: UploadSession, digest: str, folder: Path) -> FileRecord:
        upload = Upload(folder / "data", max_bytes=session.size_bytes, field="data")
        with closing(upload):
            await in_thread(self._assemble, session, upload)
        for field, declared in (("digest", digest), ("header.digest", session.digest)):
            if declared and declared != upload.digest:
                await in_thread(self._remove, session.tenant, session.id)
                raise digest_mismatch(field, declared, upload.digest)
        return await self._files.create(
            session.tenant,
            session.filename,
            session.purpose,
            upload,
            declared_digest="",
            file_id=session.file_id,
        )

    async def _completed(self, tenant: str, upload_id: str) -> FileRecord:
        file_id = "file-" + upload_id.removeprefix(ID_PREFIX + "-")
        try:
            return await self._files.get(tenant, file_id)
        except NotFound:
            raise _not_found(upload_id) from None

    def _lock(self, upload_id: str) -> asyncio.Lock:
        return self._locks.setdefault(upload_id, asyncio.Lock())

    def _store_session(self, session: UploadSession) -> None:
        num_open = sum(1 for _ in self._store.list(f"{_SESSIONS}{session.tenant}/"))
        limit = self._limits.max_open_uploads
        if num_open >= limit:
            raise ResourceExhausted(
                "too_many_uploads", f"A tenant may have {limit} open uploads.", value=num_open, limit=limit
            )
        self._store.put(_session_key(session.tenant, session.id), _SESSION_CODEC.encode(session))

    def _session(self, tenant: str, upload_id: str) -> UploadSession:
        if not ids.is_id(ID_PREFIX, upload_id):
            raise _not_found(upload_id)
        try:
            session = _SESSION_CODEC.decode(self._store.get(_session_key(tenant, upload_id)))
        except ObjectNotFoundError:
            raise _not_found(upload_id) from None
        if session.expire_time_ms <= now_ms():
            raise _not_found(upload_id)
        return session

    def _committed_bytes(self, session: UploadSession) -> int:
        prefix = _part_prefix(session.tenant, session.id)
        return sum(found.size_bytes for found in self._store.list(prefix))

    def _assemble(self, session: UploadSession, upload: Upload) -> None:
        for found in self._store.list(_part_prefix(session.tenant, session.id)):
            for chunk in self._store.stream(found.key):
                upload.write(chunk)

    def _remove(self, tenant: str, upload_id: str) -> None:
        for found in list(self._store.list(_part_prefix(tenant, upload_id))):
            self._store.delete(found.key)
        self._store.delete(_session_key(tenant, upload_id))

    def _ids_to_sweep(self) -> set[tuple[str, str]]:
        live: set[tuple[str, str]] = set()
        ended: set[tuple[str, str]] = set()
        for found in self._store.list(_SESSIONS):
            session = _SESSION_CODEC.decode(self._store.get(found.key))
            known = live if session.expire_time_ms > now_ms() else ended
            known.add((session.tenant, session.id))
        for found in self._store.list(_PARTS):
            tenant, upload_id, _ = found.key.removeprefix(_PARTS).split("/")
            if (tenant, upload_id) not in live:
                ended.add((tenant, upload_id))
        return ended


class Appender:
    """Bytes that are added to one upload, in order."""

    def __init__(self, store: ObjectStore, session: UploadSession, committed_bytes: int) -> None:
        self._store = store
        self.session = session
        self.committed_bytes = committed_bytes
        self._pending = bytearray()

    async def add(self, offset: int, data: bytes) -> None:
        """Add bytes that lie at `offset` of the file. Bytes that are there already are passed over.

        Raises:
            OutOfRange: `bad_offset`, for a gap, for a part of what is there and more, or for other bytes than
                those that are there.
            ResourceExhausted: `too_large`.
        """
        received_bytes = self.committed_bytes + len(self._pending)
        end = offset + len(data)
        if end > self.session.size_bytes:
            raise too_large("data", end, self.session.size_bytes)
        if end <= received_bytes and offset < received_bytes:
            await self.commit()
            if await in_thread(self._stored, offset, len(data)) == data:
                return
        if offset != received_bytes:
            await self.commit()
            raise OutOfRange(
                "bad_offset",
                f"The upload goes on at byte {received_bytes}, not {offset}.",
                field="offset",
                value=offset,
                limit=received_bytes,
                metadata={"committed_bytes": str(self.committed_bytes)},
            )
        self._pending += data
        if len(self._pending) >= PART_BYTES:
            await self.commit()

    async def commit(self) -> None:
        """Make durable what was added."""
        if not self._pending:
            return
        data = bytes(self._pending)
        prefix = _part_prefix(self.session.tenant, self.session.id)
        key = f"{prefix}{self.committed_bytes:015d}-{len(data)}"
        failpoint("upload.before_part")
        await in_thread(self._store.put, key, data)
        failpoint("upload.after_part")
        self.committed_bytes += len(data)
        self._pending.clear()

    def _stored(self, offset: int, length: int) -> bytes:
        """Return committed bytes."""
        found = io.BytesIO()
        for part in self._store.list(_part_prefix(self.session.tenant, self.session.id)):
            start = int(part.key.rpartition("/")[2].partition("-")[0])
            first, last = max(offset, start), min(offset + length, start + part.size_bytes)
            if first < last:
                for chunk in self._store.stream(part.key, offset=first - start, length=last - first):
                    found.write(chunk)
        return found.getvalue()


def checked_digest(digest: str) -> str:
    """Return the digest of a whole upload, which may be empty. Raises `InvalidArgument` (`bad_digest`)."""
    return names.digest(digest, field="digest") if digest else ""


def _session_key(tenant: str, upload_id: str) -> str:
    return f"{_SESSIONS}{tenant}/{upload_id}.json"


def _part_prefix(tenant: str, upload_id: str) -> str:
    return f"{_PARTS}{tenant}/{upload_id}/"


def _not_found(upload_id: str) -> NotFound:
    shown = upload_id[:64]
    message = f"There is no open upload {shown!r}."
    return NotFound("upload_not_found", message, resource=f"uploads/{shown}")
