"""Big files that come in parts: what was announced, and the parts until they are put together.

OpenAI lets parts come at the same time and in any order, and the order is told at the end; the registry's
uploads grow at their end alone. So parts are objects of the gateway, which any gateway can read:

    gateway/uploads/<tenant>/<upload id>/upload
    gateway/uploads/<tenant>/<upload id>/parts/<part id>
    gateway/uploads/<tenant>/<upload id>/end

Nothing is overwritten. The upload of the registry, which has the same id, is begun with the first and
completed with the last; it checks size, purpose and quota before a byte has come.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

from pydantic import BaseModel, ConfigDict

from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    LorafleetError,
    NotFound,
    ResourceExhausted,
)
from services.common.ids import is_id, new_id
from services.common.store import ObjectExistsError, ObjectNotFoundError, ObjectStore
from services.gateway.uploads import ReceivedFile, too_large

_logger = logging.getLogger("lorafleet.gateway.uploads")

MAX_PARTS = 10_000
SWEEP_SECONDS = 300.0
# How long an upload that has expired, or ended, is still told of.
KEPT_SECONDS = 3600
# A part that is sent again because its answer was lost leaves the first one behind.
_SPARE_FACTOR = 2
_ROOT = "gateway/uploads/"


class Announced(BaseModel):
    """What an upload is to become. Times are Unix seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    filename: str
    purpose: str
    mime_type: str
    size_bytes: int
    create_time: int
    expire_time: int


class Ended(BaseModel):
    """How an upload ended: by its file, or cancelled where there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file_id: str | None


class UploadParts:
    """The uploads of all tenants. Methods wait for the store; call them from a thread."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def announce(self, tenant: str, announced: Announced) -> None:
        """Remember what an upload is to become."""
        self._store.put(_key(tenant, announced.id, "upload"), announced.model_dump_json().encode())

    def find(self, tenant: str, upload_id: str) -> tuple[Announced, Ended | None]:
        """Return an upload and how it ended.

        Raises:
            NotFound: `upload_not_found`.
        """
        if not is_id("upload", upload_id):
            raise _not_found(upload_id)
        try:
            announced = Announced.model_validate_json(self._store.get(_key(tenant, upload_id, "upload")))
        except ObjectNotFoundError:
            raise _not_found(upload_id) from None
        try:
            ended = Ended.model_validate_json(self._store.get(_key(tenant, upload_id, "end")))
        except ObjectNotFoundError:
            return announced, None
        return announced, ended

    def pending(self, tenant: str, upload_id: str) -> Announced:
        """Return an upload that parts may be added to.

        Raises:
            NotFound: `upload_not_found`.
            FailedPrecondition: `upload_completed`, `upload_cancelled` or `upload_expired`.
        """
        announced, ended = self.find(tenant, upload_id)
        if ended is not None:
            state = "cancelled" if ended.file_id is None else "completed"
            raise FailedPrecondition(f"upload_{state}", f"the upload is {state}", field="upload_id")
        if announced.expire_time <= time.time():
            raise FailedPrecondition("upload_expired", "the upload has expired", field="upload_id")
        return announced

    def add(self, tenant: str, upload_id: str, content: ReceivedFile) -> str:
        """Store a part and return its id.

        Raises:
            NotFound, FailedPrecondition: as `pending`.
            InvalidArgument: `empty_part`.
            ResourceExhausted: `too_large` or `too_many_parts`.
        """
        announced = self.pending(tenant, upload_id)
        if not content.size_bytes:
            raise InvalidArgument("empty_part", "the part holds no bytes", field="data")
        parts = self._parts(tenant, upload_id)
        if len(parts) >= MAX_PARTS:
            raise ResourceExhausted(
                "too_many_parts", f"an upload has at most {MAX_PARTS} parts", limit=MAX_PARTS, final=True
            )
        if content.size_bytes > announced.size_bytes:
            raise too_large("data", announced.size_bytes)
        if sum(parts.values()) + content.size_bytes > _SPARE_FACTOR * announced.size_bytes:
            raise too_large("data", announced.size_bytes)
        part_id = new_id("part")
        self._store.put(_key(tenant, upload_id, f"parts/{part_id}"), content.read_chunks())
        return part_id

    def check(self, tenant: str, announced: Announced, part_ids: Sequence[str], md5: str | None) -> None:
        """Check that parts make the announced file.

        Raises:
            InvalidArgument: `part_not_found`, `size_mismatch` or `md5_mismatch`.
        """
        parts = self._parts(tenant, announced.id)
        for place, part_id in enumerate(part_ids):
            if part_id not in parts:
                raise InvalidArgument(
                    "part_not_found", "no such part", field=f"part_ids[{place}]", value=part_id
                )
        size_bytes = sum(parts[part_id] for part_id in part_ids)
        if size_bytes != announced.size_bytes:
            raise InvalidArgument(
                "size_mismatch",
                f"the parts have {size_bytes} bytes where {announced.size_bytes} were announced",
                field="part_ids",
                value=size_bytes,
                limit=announced.size_bytes,
            )
        if md5 is not None:
            # A check sum here, for a transfer; nobody is kept out by it.
            found = hashlib.md5(usedforsecurity=False)
            for chunk in self.chunks(tenant, announced.id, part_ids):
                found.update(chunk)
            if found.hexdigest() != md5.lower():
                raise InvalidArgument("md5_mismatch", "the parts have another MD5", field="md5", value=md5)

    def chunks(self, tenant: str, upload_id: str, part_ids: Sequence[str]) -> Iterator[bytes]:
        """Yield the bytes of parts, one after the other."""
        for part_id in part_ids:
            yield from self._store.stream(_key(tenant, upload_id, f"parts/{part_id}"))

    def end(self, tenant: str, upload_id: str, ended: Ended) -> None:
        """Remember how an upload ended, and drop its parts."""
        # Whoever ends the same upload at the same moment has been told the same by the registry.
        with suppress(ObjectExistsError):
            body = ended.model_dump_json().encode()
            self._store.put(_key(tenant, upload_id, "end"), body, if_absent=True)
        for part_id in self._parts(tenant, upload_id):
            self._store.delete(_key(tenant, upload_id, f"parts/{part_id}"))

    def sweep(self) -> int:
        """Remove uploads that expired `KEPT_SECONDS` ago; return how many objects that were."""
        keys = [found.key for found in self._store.list(_ROOT)]
        live = set()
        for key in keys:
            if key.endswith("/upload"):
                try:
                    announced = Announced.model_validate_json(self._store.get(key))
                except ObjectNotFoundError:
                    continue
                if announced.expire_time + KEPT_SECONDS > time.time():
                    live.add(key.removesuffix("upload"))
        dead = [key for key in keys if "/".join(key.split("/")[:4]) + "/" not in live]
        # The upload's own object last: without it nobody would find the others to be dead.
        for key in sorted(dead, key=lambda key: key.endswith("/upload")):
            self._store.delete(key)
        return len(dead)

    @asynccontextmanager
    async def swept(self) -> AsyncIterator[None]:
        """Sweep every `SWEEP_SECONDS` while the body runs."""
        task = asyncio.create_task(self._keep_sweeping(), name="expired uploads")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await asyncio.to_thread(self.sweep)
            except LorafleetError as error:
                _logger.warning("expired uploads were not swept", extra={"detail": error.message})

    def _parts(self, tenant: str, upload_id: str) -> dict[str, int]:
        """Return the parts of an upload with their sizes."""
        prefix = _key(tenant, upload_id, "parts/")
        return {found.key.removeprefix(prefix): found.size_bytes for found in self._store.list(prefix)}


def _key(tenant: str, upload_id: str, name: str) -> str:
    return f"{_ROOT}{tenant}/{upload_id}/{name}"


def _not_found(upload_id: str) -> NotFound:
    return NotFound("upload_not_found", "no such upload", field="upload_id", value=upload_id)
