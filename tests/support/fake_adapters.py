"""An adapter service in memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from lorafleet.registry.v1 import adapter_pb2 as reg
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceServicer
from services.common.call_context import current_tenant
from services.common.errors import (
    Aborted,
    FailedPrecondition,
    NotFound,
)
from services.common.names import AdapterRef, adapter_name
from tests.support.fake_base import BASE, FINGERPRINT, Context, digest_of, now


class FakeAdapters(AdapterServiceServicer):
    """Adapter versions and aliases by tenant, in memory."""

    def __init__(self) -> None:
        self.adapters: dict[tuple[str, str], reg.Adapter] = {}
        self.versions: dict[tuple[str, str], list[reg.AdapterVersion]] = {}
        self.history: dict[tuple[str, str, str], list[reg.Alias]] = {}
        self.resolved: list[str] = []
        self.contents: dict[str, dict[str, bytes]] = {}

    def publish(
        self, name: str, *, tenant: str = "default", fingerprint: str = FINGERPRINT
    ) -> reg.AdapterVersion:
        """Add the next version of an adapter."""
        versions = self.versions.setdefault((tenant, name), [])
        version = reg.AdapterVersion(
            adapter=name,
            version=len(versions) + 1,
            digest=digest_of(tenant, name, len(versions) + 1),
            state=reg.VersionState.VERSION_STATE_READY,
            base_fingerprint_digest=fingerprint,
            base_model=BASE,
            create_time=now(),
        )
        versions.append(version)
        adapter = self.adapters.setdefault(
            (tenant, name), reg.Adapter(name=name, create_time=version.create_time)
        )
        adapter.latest_version.CopyFrom(version)
        adapter.num_versions = len(versions)
        return version

    def point(self, name: str, alias: str, version: int, *, tenant: str = "default") -> reg.Alias:
        """Move an alias."""
        moves = self.history.setdefault((tenant, name, alias), [])
        moved = reg.Alias(
            adapter=name,
            name=alias,
            version=version,
            digest=self.versions[tenant, name][version - 1].digest,
            generation=len(moves) + 1,
            update_time=now(),
        )
        moves.append(moved)
        adapter = self.adapters[tenant, name]
        kept = [other for other in adapter.aliases if other.name != alias]
        del adapter.aliases[:]
        adapter.aliases.extend([*kept, moved])
        return moved

    def resolve(self, text: str, tenant: str) -> reg.AdapterVersion:
        """Return the version that a reference names now."""
        ref = AdapterRef.parse(text, field="ref")
        versions = self.versions.get((tenant, ref.name))
        if not versions:
            raise NotFound("adapter_not_found", "no such adapter", field="ref")
        if ref.alias is not None:
            moves = self.history.get((tenant, ref.name, ref.alias))
            if not moves:
                raise NotFound("alias_not_found", "no such alias", field="ref")
            return versions[moves[-1].version - 1]
        if ref.version is None and ref.digest is None:
            return versions[-1]
        for version in versions:
            if ref.version == version.version or ref.digest == version.digest:
                return version
        raise NotFound("version_not_found", "no such version", field="ref")

    async def ResolveVersion(
        self, request: reg.ResolveVersionRequest, context: Context
    ) -> reg.AdapterVersion:
        self.resolved.append(request.ref)
        return self.resolve(request.ref, current_tenant())

    async def GetAdapter(self, request: reg.GetAdapterRequest, context: Context) -> reg.Adapter:
        return self._adapter(request.adapter)

    async def ListAdapters(
        self, request: reg.ListAdaptersRequest, context: Context
    ) -> reg.ListAdaptersResponse:
        own = [entry for (tenant, _), entry in sorted(self.adapters.items()) if tenant == current_tenant()]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        token = str(end) if end < len(own) else ""
        return reg.ListAdaptersResponse(adapters=own[start:end], next_page_token=token)

    async def ListVersions(
        self, request: reg.ListVersionsRequest, context: Context
    ) -> reg.ListVersionsResponse:
        self._adapter(request.adapter)
        versions = self.versions[current_tenant(), request.adapter]
        return reg.ListVersionsResponse(versions=versions[::-1])

    async def ListAliases(self, request: reg.ListAliasesRequest, context: Context) -> reg.ListAliasesResponse:
        return reg.ListAliasesResponse(aliases=self._adapter(request.adapter).aliases)

    async def SetAlias(self, request: reg.SetAliasRequest, context: Context) -> reg.Alias:
        self.resolve(f"{request.adapter}:{request.version}", current_tenant())
        moves = self.history.get((current_tenant(), request.adapter, request.alias), [])
        if request.HasField("expected_generation") and request.expected_generation != len(moves):
            raise Aborted("alias_conflict", "somebody else moved the alias", final=True)
        return self.point(request.adapter, request.alias, request.version, tenant=current_tenant())

    async def RollbackAlias(self, request: reg.RollbackAliasRequest, context: Context) -> reg.Alias:
        moves = self.history.get((current_tenant(), request.adapter, request.alias), [])
        if not moves:
            raise NotFound("alias_not_found", "no such alias", field="alias")
        if len(moves) < 2:
            raise FailedPrecondition("no_previous_version", "the alias never moved")
        return self.point(request.adapter, request.alias, moves[-2].version, tenant=current_tenant())

    async def ListAliasHistory(
        self, request: reg.ListAliasHistoryRequest, context: Context
    ) -> reg.ListAliasHistoryResponse:
        moves = self.history.get((current_tenant(), request.adapter, request.alias), [])
        return reg.ListAliasHistoryResponse(moves=moves[::-1])

    async def PublishVersion(
        self, request_iterator: AsyncIterator[reg.PublishVersionRequest], context: Context
    ) -> reg.AdapterVersion:
        header, files = reg.PublishVersionHeader(), dict[str, bytes]()
        async for request in request_iterator:
            if request.WhichOneof("message") == "header":
                header = request.header
            else:
                files[request.chunk.file] = files.get(request.chunk.file, b"") + request.chunk.data
        adapter_name(header.adapter)
        for file in header.files:
            assert file.digest == "sha256:" + hashlib.sha256(files[file.name]).hexdigest()
        made = self.publish(
            header.adapter, tenant=current_tenant(), fingerprint=header.base_fingerprint_digest
        )
        made.files.extend(header.files)
        made.card.CopyFrom(header.card)
        self.contents[made.digest] = files
        return made

    async def DownloadVersion(
        self, request: reg.DownloadVersionRequest, context: Context
    ) -> AsyncIterator[reg.DownloadVersionResponse]:
        version = self.resolve(request.ref, current_tenant())
        yield reg.DownloadVersionResponse(data=self.contents[version.digest][request.file])

    async def DeleteAdapter(
        self, request: reg.DeleteAdapterRequest, context: Context
    ) -> reg.DeleteAdapterResponse:
        self._adapter(request.adapter)
        del self.adapters[current_tenant(), request.adapter]
        del self.versions[current_tenant(), request.adapter]
        return reg.DeleteAdapterResponse()

    async def DeleteVersion(self, request: reg.DeleteVersionRequest, context: Context) -> reg.AdapterVersion:
        version = self.resolve(f"{request.adapter}:{request.version}", current_tenant())
        self.versions[current_tenant(), request.adapter].remove(version)
        return version

    async def DeleteAlias(self, request: reg.DeleteAliasRequest, context: Context) -> reg.DeleteAliasResponse:
        if self.history.pop((current_tenant(), request.adapter, request.alias), None) is None:
            raise NotFound("alias_not_found", "no such alias", field="alias")
        return reg.DeleteAliasResponse()

    def _adapter(self, name: str) -> reg.Adapter:
        adapter = self.adapters.get((current_tenant(), name))
        if adapter is None:
            raise NotFound("adapter_not_found", "no such adapter", field="adapter")
        return adapter
