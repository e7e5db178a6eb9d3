"""Adapters and their immutable versions: publish, serve, delete."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from services.common import names, telemetry
from services.common.adapter_format import AdapterSummary
from services.common.errors import FailedPrecondition, InvalidArgument
from services.registry.bases import Bases
from services.registry.blobs import Blobs, Piece
from services.registry.catalogue import Catalogue, Mutation
from services.registry.clock import now_ms
from services.registry.config import RegistryLimits
from services.registry.index import adapter_key, tenant_key
from services.registry.lookup import Lookup, Version, adapter_not_found, version_not_found
from services.registry.publishing import Incoming, Publication, format_facts, identity
from services.registry.records import (
    ALIAS_MOVES,
    AliasMove,
    BaseRecord,
    StoredFile,
    VersionDeletion,
    VersionRecord,
)
from services.registry.uninterrupted import in_thread
from services.registry.usage import Usage


class Adapters:
    """Makes, serves and retires the versions of all tenants; each call acts for one."""

    def __init__(
        self,
        catalogue: Catalogue,
        lookup: Lookup,
        blobs: Blobs,
        bases: Bases,
        usage: Usage,
        limits: RegistryLimits,
    ) -> None:
        self._catalogue = catalogue
        self._lookup = lookup
        self._blobs = blobs
        self._bases = bases
        self._usage = usage
        self._limits = limits

    async def published(self, tenant: str, publication: Publication) -> Version | None:
        """Return the version that this publication made before, None where it is new.

        Raises:
            InvalidArgument, ResourceExhausted: as `Publication.check`, and `quota_exceeded`.
            NotFound: `base_not_found`.
            FailedPrecondition: `idempotency_key_reused`, where its key made something else.
        """
        publication.check(self._limits.adapter)
        await self._bases.by_digest(publication.base_digest)
        earlier = await self._earlier(self._catalogue, tenant, publication)
        if earlier is None:
            await self._usage.check_room(None, tenant, publication.size_bytes)
        return earlier

    async def publish(self, tenant: str, publication: Publication, incoming: Incoming) -> Version:
        """Check what came and make it the next version; it is durable, with its bytes, on return.

        Raises:
            InvalidArgument, ResourceExhausted: as `Incoming.check`; nothing is stored then.
            NotFound, FailedPrecondition: as `published`.
        """
        base = await self._bases.by_digest(publication.base_digest)
        summary = await in_thread(incoming.check, base, self._limits.adapter)
        with self._blobs.in_use(file.digest for file in publication.files):
            for file in publication.files:
                await self._blobs.keep(file.digest, incoming.uploads[file.name].path)
            return await self._record(tenant, publication, base, summary)

    def download(
        self, version: Version, file_name: str, *, offset: int, length: int | None
    ) -> AsyncGenerator[Piece, None]:
        """Yield (offset, bytes) of one file of a version.

        Raises:
            InvalidArgument: `unexpected_file`.
            OutOfRange, DataLoss: as `Blobs.stream`.
        """
        file = _file_named(version.record, file_name)
        return self._blobs.stream(file.digest, size_bytes=file.size_bytes, offset=offset, length=length)

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

    async def _record(
        self, tenant: str, publication: Publication, base: BaseRecord, summary: AdapterSummary
    ) -> Version:
        async with self._catalogue.mutation() as mutation:
            earlier = await self._earlier(mutation, tenant, publication)
            if earlier is not None:
                return earlier
            await self._usage.check_room(mutation, tenant, publication.size_bytes)
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
                traceparent=telemetry.traceparent(),
            )
            await mutation.append(record)
        return Version(record, None, ())

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
        return await self._lookup.version(source, tenant, made["adapter"], int(made["version"]))

    async def _delete_version(self, mutation: Mutation, tenant: str, adapter: str, number: int) -> Version:
        found = await self._lookup.version(mutation, tenant, adapter, number)
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


def _file_named(record: VersionRecord, name: str) -> StoredFile:
    for file in record.files:
        if file.name == name:
            return file
    known = ", ".join(file.name for file in record.files)
    message = f"A version holds {known}; not {name[:120]!r}."
    raise InvalidArgument("unexpected_file", message, field="file", value=name, limit=known)
