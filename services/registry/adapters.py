"""Adapters and their immutable versions: publish, resolve, list, delete."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from services.common import names
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.names import AdapterRef
from services.registry.bases import Bases
from services.registry.blobs import Blobs
from services.registry.catalogue import Catalogue, Mutation
from services.registry.clock import now_ms
from services.registry.config import RegistryLimits
from services.registry.index import adapter_key, tenant_key
from services.registry.publishing import Incoming, Publication, format_facts, identity
from services.registry.records import (
    ALIAS_MOVES,
    VERSIONS,
    AliasMove,
    StoredFile,
    VersionDeletion,
    VersionRecord,
)
from services.registry.uninterrupted import in_thread


@dataclass(frozen=True, slots=True)
class Version:
    """A version as it stands now: its record, when it was deleted, and the aliases that point to it."""

    record: VersionRecord
    delete_time_ms: int | None
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterOverview:
    """An adapter as it stands now. `num_versions` counts those that are not deleted."""

    name: str
    latest: Version | None
    num_versions: int
    aliases: tuple[AliasMove, ...]
    create_time_ms: int


class Adapters:
    """The adapters of all tenants; each call acts for one, and sees nothing of the others."""

    def __init__(self, catalogue: Catalogue, blobs: Blobs, bases: Bases, limits: RegistryLimits) -> None:
        self._catalogue = catalogue
        self._blobs = blobs
        self._bases = bases
        self._limits = limits

    async def published(self, tenant: str, publication: Publication) -> Version | None:
        """Return the version that this publication made before, None where it is new.

        Raises:
            InvalidArgument, ResourceExhausted: as `Publication.check`.
            NotFound: `base_not_found`.
            FailedPrecondition: `idempotency_key_reused`, where its key made something else.
        """
        publication.check(self._limits.adapter)
        await self._bases.by_digest(publication.base_digest)
        return await self._earlier(self._catalogue, tenant, publication)

    async def publish(self, tenant: str, publication: Publication, incoming: Incoming) -> Version:
        """Check what came and make it the next version; it is durable, with its bytes, on return.

        Raises:
            InvalidArgument, ResourceExhausted: as `Incoming.check`; nothing is stored then.
            NotFound, FailedPrecondition: as `published`.
        """
        base = await self._bases.by_digest(publication.base_digest)
        summary = await in_thread(incoming.check, base, self._limits.adapter)
        for file in publication.files:
            await self._blobs.keep(file.digest, incoming.uploads[file.name].path)
        async with self._catalogue.mutation() as mutation:
            earlier = await self._earlier(mutation, tenant, publication)
            if earlier is not None:
                return earlier
            [highest] = await mutation.query(
                ("HGET", adapter_key(tenant, publication.adapter, "facts"), "highest_version")
            )
            record = VersionRecord(
                tenant=tenant,
                adapter=publication.adapter,
                version=int(highest or 0) + 1,
                digest=identity(summary, base),
                base_digest=base.fingerprint.digest,
                base_model=base.name,
                files=publication.files,
                format=format_facts(summary),
                card=publication.card,
                warnings=summary.warnings,
                create_time_ms=now_ms(),
                idempotency_key=publication.idempotency_key,
                content_digest=publication.content_digest,
            )
            await mutation.append(record)
        return Version(record, None, ())

    async def resolve(self, tenant: str, ref: AdapterRef) -> Version:
        """Return the version that `ref` names now, never a deleted one.

        Raises:
            NotFound: `adapter_not_found`, `version_not_found`, `alias_not_found` or `adapter_deleted`.
        """
        number = await self._number(tenant, ref)
        found = None if number is None else await self.version(self._catalogue, tenant, ref.name, number)
        if found is None:
            raise NotFound(
                "version_not_found", f"Adapter {ref.name} has no version {ref}.", resource=f"adapters/{ref}"
            )
        if found.delete_time_ms is not None:
            raise _deleted(str(ref))
        return found

    async def overview(self, tenant: str, adapter: str) -> AdapterOverview:
        """Return one adapter. Raises `InvalidArgument` (`bad_name`) or `NotFound` (`adapter_not_found`)."""
        names.adapter_name(adapter)
        [number, count, created, aliases] = await self._catalogue.query(
            ("ZREVRANGE", adapter_key(tenant, adapter, "live"), 0, 0),
            ("ZCARD", adapter_key(tenant, adapter, "live")),
            ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
            ("HVALS", adapter_key(tenant, adapter, "aliases")),
        )
        if created is None:
            raise adapter_not_found(adapter)
        moves = sorted((ALIAS_MOVES.decode(move) for move in aliases), key=lambda move: move.alias)
        latest = await self.version(self._catalogue, tenant, adapter, int(number[0])) if number else None
        return AdapterOverview(
            name=adapter,
            latest=latest,
            num_versions=int(count),
            aliases=tuple(move for move in moves if not move.is_deletion),
            create_time_ms=int(created),
        )

    async def page(
        self, tenant: str, after: str, size: int, name_contains: str
    ) -> tuple[list[AdapterOverview], bool]:
        """Return up to `size` adapters by name, after the name `after`, and whether there are more."""
        [found] = await self._catalogue.query(
            ("ZRANGEBYLEX", tenant_key(tenant, "adapters"), f"({after}" if after else "-", "+")
        )
        wanted = [name.decode() for name in found if name_contains in name.decode()]
        overviews = await asyncio.gather(*(self.overview(tenant, name) for name in wanted[:size]))
        return list(overviews), len(wanted) > size

    async def versions_page(
        self, tenant: str, adapter: str, before: int | None, size: int, *, include_deleted: bool
    ) -> tuple[list[Version], bool]:
        """Return up to `size` versions, newest first, older than `before`, and whether there are more.

        Raises:
            InvalidArgument: `bad_name`.
            NotFound: `adapter_not_found`.
        """
        names.adapter_name(adapter)
        which = "versions" if include_deleted else "live"
        command = "HKEYS" if include_deleted else "ZRANGE"
        bounds = () if include_deleted else (0, -1)
        [created, found] = await self._catalogue.query(
            ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
            (command, adapter_key(tenant, adapter, which), *bounds),
        )
        if created is None:
            raise adapter_not_found(adapter)
        numbers = sorted((int(number) for number in found), reverse=True)
        wanted = [number for number in numbers if before is None or number < before]
        versions = [
            version
            for number in wanted[:size]
            if (version := await self.version(self._catalogue, tenant, adapter, number)) is not None
        ]
        return versions, len(wanted) > size

    async def download(
        self, version: Version, file_name: str, *, offset: int, length: int | None
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Yield (offset, bytes) of one file of a version.

        Raises:
            InvalidArgument: `unexpected_file`.
            OutOfRange, DataLoss: as `Blobs.stream`.
        """
        file = _file_named(version.record, file_name)
        async for piece in self._blobs.stream(
            file.digest, size_bytes=file.size_bytes, offset=offset, length=length
        ):
            yield piece

    async def delete_version(self, tenant: str, adapter: str, number: int) -> Version:
        """Mark a version deleted, for good; a second time nothing happens.

        Raises:
            InvalidArgument: `bad_name`.
            NotFound: `adapter_not_found` or `version_not_found`.
        """
        names.adapter_name(adapter)
        async with self._catalogue.mutation() as mutation:
            return await self._delete_version(mutation, tenant, adapter, number)

    async def delete(self, tenant: str, adapter: str) -> None:
        """Delete every version and every alias. Raises `bad_name` or `adapter_not_found`, as `overview`."""
        names.adapter_name(adapter)
        async with self._catalogue.mutation() as mutation:
            [created, live, aliases] = await mutation.query(
                ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
                ("ZRANGE", adapter_key(tenant, adapter, "live"), 0, -1),
                ("HVALS", adapter_key(tenant, adapter, "aliases")),
            )
            if created is None:
                raise adapter_not_found(adapter)
            for move in map(ALIAS_MOVES.decode, aliases):
                if not move.is_deletion:
                    await mutation.append(
                        AliasMove(tenant, adapter, move.alias, move.generation + 1, 0, "", now_ms())
                    )
            for number in live:
                await self._delete_version(mutation, tenant, adapter, int(number))

    async def version(
        self, source: Catalogue | Mutation, tenant: str, adapter: str, number: int
    ) -> Version | None:
        """Return version `number`, be it deleted or not; None where there is none."""
        [record, delete_time_ms, aliases] = await source.query(
            ("HGET", adapter_key(tenant, adapter, "versions"), number),
            ("HGET", adapter_key(tenant, adapter, "deletions"), number),
            ("HVALS", adapter_key(tenant, adapter, "aliases")),
        )
        if record is None:
            return None
        pointing = (move.alias for move in map(ALIAS_MOVES.decode, aliases) if move.version == number)
        return Version(
            VERSIONS.decode(record),
            None if delete_time_ms is None else int(delete_time_ms),
            tuple(sorted(pointing)),
        )

    async def _number(self, tenant: str, ref: AdapterRef) -> int | None:
        [created, newest, move, by_digest] = await self._catalogue.query(
            ("HGET", adapter_key(tenant, ref.name, "facts"), "created_ms"),
            ("ZREVRANGE", adapter_key(tenant, ref.name, "live"), 0, 0),
            ("HGET", adapter_key(tenant, ref.name, "aliases"), ref.alias or ""),
            ("HGET", adapter_key(tenant, ref.name, "digests"), ref.digest or ""),
        )
        if created is None:
            raise adapter_not_found(ref.name)
        if ref.version is not None:
            return ref.version
        if ref.alias is not None:
            if move is None or ALIAS_MOVES.decode(move).is_deletion:
                raise alias_not_found(ref.name, ref.alias)
            return ALIAS_MOVES.decode(move).version
        if ref.digest is not None:
            return None if by_digest is None else int(by_digest)
        if not newest:
            raise _deleted(ref.name)
        return int(newest[0])

    async def _earlier(
        self, source: Catalogue | Mutation, tenant: str, publication: Publication
    ) -> Version | None:
        if not publication.idempotency_key:
            return None
        [found] = await source.query(("HGET", tenant_key(tenant, "publishes"), publication.idempotency_key))
        if found is None:
            return None
        made = json.loads(found)
        if made["content"] != publication.content_digest:
            raise FailedPrecondition(
                "idempotency_key_reused",
                f"This idempotency key made {made['adapter']}:{made['version']}, of other content.",
                field="header.idempotency_key",
                final=True,
            )
        return await self.version(source, tenant, made["adapter"], int(made["version"]))

    async def _delete_version(self, mutation: Mutation, tenant: str, adapter: str, number: int) -> Version:
        found = await self.version(mutation, tenant, adapter, number)
        if found is None:
            [created] = await mutation.query(("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"))
            if created is None:
                raise adapter_not_found(adapter)
            raise version_not_found(adapter, number)
        if found.delete_time_ms is None:
            deletion = VersionDeletion(tenant, adapter, number, now_ms())
            await mutation.append(deletion)
            return Version(found.record, deletion.delete_time_ms, found.aliases)
        return found


def adapter_not_found(adapter: str) -> NotFound:
    """The error for an adapter that is not there, or not this tenant's."""
    return NotFound("adapter_not_found", f"There is no adapter {adapter!r}.", resource=f"adapters/{adapter}")


def version_not_found(adapter: str, number: int) -> NotFound:
    """The error for a version number that was never given."""
    message = f"Adapter {adapter} has no version {number}."
    return NotFound("version_not_found", message, resource=f"adapters/{adapter}:{number}")


def alias_not_found(adapter: str, alias: str) -> NotFound:
    """The error for an alias that points nowhere."""
    message = f"Adapter {adapter} has no alias {alias!r}."
    return NotFound("alias_not_found", message, resource=f"adapters/{adapter}@{alias}")


def _deleted(ref: str) -> NotFound:
    return NotFound("adapter_deleted", f"Adapter {ref} was deleted.", resource=f"adapters/{ref}")


def _file_named(record: VersionRecord, name: str) -> StoredFile:
    for file in record.files:
        if file.name == name:
            return file
    known = ", ".join(file.name for file in record.files)
    message = f"A version holds {known}; not {name[:120]!r}."
    raise InvalidArgument("unexpected_file", message, field="file", value=name, limit=known)
