"""AdapterService."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from lorafleet.registry.v1 import adapter_pb2, adapter_pb2_grpc
from services.common.call_context import current_tenant
from services.common.errors import InvalidArgument
from services.common.names import AdapterRef
from services.registry import convert, paging
from services.registry.adapters import Adapters
from services.registry.aliases import Aliases
from services.registry.leases import Leases
from services.registry.lookup import Lookup
from services.registry.publishing import Incoming
from services.registry.scratch import Scratch
from services.registry.servicers.chunks import check_chunk, length_or_all
from services.registry.token_secret import TokenSource
from services.registry.transfers import Transfers
from services.registry.uninterrupted import in_thread
from services.registry.usage import Usage
from services.registry.watching import Watching

RESUME_METADATA = "lorafleet-resume-token"


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """Publishes, resolves, serves and retires versions, moves aliases and tells of it, for the tenant of the
    call."""

    def __init__(
        self,
        *,
        lookup: Lookup,
        adapters: Adapters,
        aliases: Aliases,
        watching: Watching,
        leases: Leases,
        usage: Usage,
        tokens: TokenSource,
        scratch: Scratch,
        transfers: Transfers,
    ) -> None:
        self._lookup = lookup
        self._adapters = adapters
        self._aliases = aliases
        self._watching = watching
        self._leases = leases
        self._usage = usage
        self._tokens = tokens
        self._scratch = scratch
        self._transfers = transfers

    async def PublishVersion(  # noqa: N802
        self,
        request_iterator: AsyncIterator[adapter_pb2.PublishVersionRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> adapter_pb2.AdapterVersion:
        """See adapter.proto."""
        tenant = current_tenant()
        publication = convert.publication_from_message(await _header(request_iterator))
        version = await self._adapters.published(tenant, publication)
        if version is None:
            with (
                self._scratch.folder() as folder,
                contextlib.closing(Incoming(publication, folder)) as incoming,
            ):
                async with contextlib.aclosing(self._transfers.incoming(request_iterator)) as requests:
                    async for request in requests:
                        if request.WhichOneof("message") != "chunk":
                            raise InvalidArgument(
                                "bad_stream", "After the header only chunks may follow.", field="message"
                            )
                        check_chunk(request.chunk.data)
                        await in_thread(incoming.write, request.chunk.file, request.chunk.data)
                version = await self._adapters.publish(tenant, publication, incoming)
        return convert.version_to_message(version)

    async def GetAdapter(  # noqa: N802
        self, request: adapter_pb2.GetAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.Adapter:
        """See adapter.proto."""
        return convert.adapter_to_message(await self._lookup.overview(current_tenant(), request.adapter))

    async def ListAdapters(  # noqa: N802
        self, request: adapter_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.ListAdaptersResponse:
        """See adapter.proto."""
        tokens, tenant = await self._tokens.get(), current_tenant()
        scope = (tenant, "adapters", request.name_contains)
        size = paging.page_size(request.page_size)
        after = tokens.position(request.page_token, *scope)
        found, more = await self._lookup.page(tenant, after, size, request.name_contains)
        return adapter_pb2.ListAdaptersResponse(
            adapters=[convert.adapter_to_message(adapter) for adapter in found],
            next_page_token=tokens.after(found[-1].name, *scope) if more else "",
        )

    async def DeleteAdapter(  # noqa: N802
        self, request: adapter_pb2.DeleteAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.DeleteAdapterResponse:
        """See adapter.proto."""
        await self._adapters.delete(current_tenant(), request.adapter)
        return adapter_pb2.DeleteAdapterResponse()

    async def ResolveVersion(  # noqa: N802
        self, request: adapter_pb2.ResolveVersionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.AdapterVersion:
        """See adapter.proto."""
        ref = AdapterRef.parse(request.ref, field="ref")
        return convert.version_to_message(await self._lookup.resolve(current_tenant(), ref))

    async def ListVersions(  # noqa: N802
        self, request: adapter_pb2.ListVersionsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.ListVersionsResponse:
        """See adapter.proto."""
        tokens, tenant = await self._tokens.get(), current_tenant()
        scope = (tenant, "versions", request.adapter, str(request.include_deleted))
        versions, more = await self._lookup.versions_page(
            tenant,
            request.adapter,
            tokens.number(request.page_token, *scope),
            paging.page_size(request.page_size),
            include_deleted=request.include_deleted,
        )
        return adapter_pb2.ListVersionsResponse(
            versions=[convert.version_to_message(version) for version in versions],
            next_page_token=tokens.after(versions[-1].record.version, *scope) if more else "",
        )

    async def DownloadVersion(  # noqa: N802
        self, request: adapter_pb2.DownloadVersionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[adapter_pb2.DownloadVersionResponse]:
        """See adapter.proto."""
        ref = AdapterRef.parse(request.ref, field="ref")
        version = await self._lookup.resolve(current_tenant(), ref)
        pieces = self._transfers.outgoing(
            self._adapters.download(
                version, request.file, offset=request.offset, length=length_or_all(request.length)
            )
        )
        async with contextlib.aclosing(pieces):
            async for offset, data in pieces:
                yield adapter_pb2.DownloadVersionResponse(offset=offset, data=data)

    async def DeleteVersion(  # noqa: N802
        self, request: adapter_pb2.DeleteVersionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.AdapterVersion:
        """See adapter.proto."""
        version = await self._adapters.delete_version(current_tenant(), request.adapter, request.version)
        return convert.version_to_message(version)

    async def SetAlias(  # noqa: N802
        self, request: adapter_pb2.SetAliasRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.Alias:
        """See adapter.proto."""
        expected = request.expected_generation if request.HasField("expected_generation") else None
        move = await self._aliases.set(
            current_tenant(), request.adapter, request.alias, request.version, expected_generation=expected
        )
        return convert.alias_to_message(move)

    async def ListAliases(  # noqa: N802
        self, request: adapter_pb2.ListAliasesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.ListAliasesResponse:
        """See adapter.proto."""
        moves = await self._aliases.current(current_tenant(), request.adapter)
        return adapter_pb2.ListAliasesResponse(aliases=[convert.alias_to_message(move) for move in moves])

    async def ListAliasHistory(  # noqa: N802
        self, request: adapter_pb2.ListAliasHistoryRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.ListAliasHistoryResponse:
        """See adapter.proto."""
        tokens, tenant = await self._tokens.get(), current_tenant()
        scope = (tenant, "moves", request.adapter, request.alias)
        moves, more = await self._aliases.history(
            tenant,
            request.adapter,
            request.alias,
            tokens.number(request.page_token, *scope),
            paging.page_size(request.page_size),
        )
        return adapter_pb2.ListAliasHistoryResponse(
            moves=[convert.alias_to_message(move) for move in moves],
            next_page_token=tokens.after(moves[-1].generation, *scope) if more else "",
        )

    async def RollbackAlias(  # noqa: N802
        self, request: adapter_pb2.RollbackAliasRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.Alias:
        """See adapter.proto."""
        expected = request.expected_generation if request.HasField("expected_generation") else None
        move = await self._aliases.rollback(
            current_tenant(), request.adapter, request.alias, expected_generation=expected
        )
        return convert.alias_to_message(move)

    async def DeleteAlias(  # noqa: N802
        self, request: adapter_pb2.DeleteAliasRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.DeleteAliasResponse:
        """See adapter.proto."""
        await self._aliases.delete(current_tenant(), request.adapter, request.alias)
        return adapter_pb2.DeleteAliasResponse()

    async def WatchAdapters(  # noqa: N802
        self, request: adapter_pb2.WatchAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[adapter_pb2.AdapterEvent]:
        """See adapter.proto."""
        tokens, tenant = await self._tokens.get(), current_tenant()
        scope = (tenant, "events")
        start = await self._watching.start(tokens.number(request.resume_token, *scope))
        # So that a watch that hears nothing can be resumed, too.
        await context.send_initial_metadata(((RESUME_METADATA, tokens.after(start, *scope)),))
        async with contextlib.aclosing(self._watching.events(tenant, start)) as events:
            async for event in events:
                yield convert.event_to_message(event, tokens.after(event.row.sequence, *scope))

    async def AcquireLease(  # noqa: N802
        self, request: adapter_pb2.AcquireLeaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.Lease:
        """See adapter.proto."""
        lease = await self._leases.acquire(
            current_tenant(), request.digest, request.holder, request.ttl_seconds
        )
        return convert.lease_to_message(lease)

    async def ReleaseLease(  # noqa: N802
        self, request: adapter_pb2.ReleaseLeaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.ReleaseLeaseResponse:
        """See adapter.proto."""
        await self._leases.release(current_tenant(), request.digest, request.holder)
        return adapter_pb2.ReleaseLeaseResponse()

    async def GetUsage(  # noqa: N802
        self, request: adapter_pb2.GetUsageRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> adapter_pb2.Usage:
        """See adapter.proto."""
        return convert.usage_to_message(await self._usage.of(current_tenant()))


async def _header(
    requests: AsyncIterator[adapter_pb2.PublishVersionRequest],
) -> adapter_pb2.PublishVersionHeader:
    first = await anext(requests, None)
    if first is None or first.WhichOneof("message") != "header":
        raise InvalidArgument("bad_stream", "The first message must be the header.", field="message")
    return first.header
