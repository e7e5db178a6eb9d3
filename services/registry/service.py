"""The registry put together: store and index below, rules in the middle, servicers on top."""

from __future__ import annotations

import asyncio

from lorafleet.registry.v1 import adapter_pb2_grpc, base_model_pb2_grpc, file_pb2_grpc
from services.common.index_connection import open_index
from services.common.server import Hook, ServiceHost
from services.common.store import ObjectStore, open_store
from services.registry.adapters import Adapters
from services.registry.aliases import Aliases
from services.registry.bases import Bases
from services.registry.blobs import Blobs
from services.registry.catalogue import Catalogue
from services.registry.collection import Collected, Collector
from services.registry.config import RegistrySettings
from services.registry.files import Files
from services.registry.index import Index
from services.registry.leases import Leases
from services.registry.lookup import Lookup
from services.registry.scratch import Scratch
from services.registry.servicers import AdapterServicer, BaseModelServicer, FileServicer
from services.registry.token_secret import TokenSource
from services.registry.transfers import Transfers
from services.registry.uninterrupted import Threads
from services.registry.uploads import Uploads
from services.registry.usage import Usage
from services.registry.verification import Verification, verify
from services.registry.watching import Watching
from services.registry.writer import Writer

SERVICES = (
    "lorafleet.registry.v1.BaseModelService",
    "lorafleet.registry.v1.AdapterService",
    "lorafleet.registry.v1.FileService",
)

# Bytes of blobs are read and written by threads of their own: a slow store holds up no record behind them.
BLOB_THREADS = 8


class Registry:
    """The objects of one registry process."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._settings = settings
        limits = settings.limits()
        self._limits = limits
        self._store = _open_store(settings)
        redis = open_index(settings.redis_url)
        writer = Writer(self._store, redis)
        self._catalogue = Catalogue(self._store, Index(redis), writer)
        self._tokens = TokenSource(self._store, writer)
        self._transfers = Transfers(settings.max_transfers)
        self._blob_threads = Threads(BLOB_THREADS, "blobs")
        self._scratch = Scratch(settings.scratch_dir or self._store.scratch_dir)
        self._blobs = Blobs(self._store, self._blob_threads)
        self._bases = Bases(self._catalogue, limits)
        self._lookup = Lookup(self._catalogue)
        self._usage = Usage(self._catalogue, settings.quota_bytes)
        self._files = Files(self._catalogue, self._blobs, self._usage)
        self._uploads = Uploads(self._store, self._files, self._usage, limits, self._scratch)
        self._leases = Leases(self._catalogue, self._lookup, redis)
        self._collector = Collector(self._store, self._catalogue, self._blobs, self._leases, self._uploads)
        self._is_store_ready = False

    async def register(self, host: ServiceHost) -> None:
        """Add the servicers to `host`, which is ready while the store and the index can be used."""
        adapters = Adapters(
            self._catalogue, self._lookup, self._blobs, self._bases, self._usage, self._limits
        )
        watching = Watching(self._catalogue, self._lookup)
        base_model_pb2_grpc.add_BaseModelServiceServicer_to_server(
            BaseModelServicer(self._bases, self._tokens), host.server
        )
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(
            AdapterServicer(
                lookup=self._lookup,
                adapters=adapters,
                aliases=Aliases(self._catalogue, self._lookup),
                watching=watching,
                leases=self._leases,
                usage=self._usage,
                tokens=self._tokens,
                scratch=self._scratch,
                transfers=self._transfers,
            ),
            host.server,
        )
        file_pb2_grpc.add_FileServiceServicer_to_server(
            FileServicer(
                self._files,
                self._uploads,
                self._blobs,
                self._tokens,
                self._limits,
                self._scratch,
                self._transfers,
            ),
            host.server,
        )
        collection = asyncio.create_task(
            self._collector.collect_every(self._settings.gc_interval_seconds, self._settings.gc_grace_seconds)
        )
        host.on_drain(watching.drain)
        host.on_close(self.close)
        host.on_close(_ended(collection))
        host.ready_when(self.probe)
        await host.ready()

    async def probe(self) -> None:
        """Return while store and index can be used. An index that lacks something is rebuilt.

        Raises:
            Unavailable: one of them cannot be reached.
        """
        if not self._is_store_ready:
            await asyncio.to_thread(self._store.ready)
            self._is_store_ready = True
        await self._catalogue.query()

    async def reindex(self) -> int:
        """Rebuild the index from the store and return the number of records."""
        await asyncio.to_thread(self._store.ready)
        return await self._catalogue.rebuild()

    async def collect(self, grace_seconds: float) -> Collected:
        """Collect garbage once; see `Collector.collect`."""
        await asyncio.to_thread(self._store.ready)
        return await self._collector.collect(grace_seconds)

    async def verify(self) -> Verification:
        """Hash everything again; see `verify`."""
        return await asyncio.to_thread(verify, self._store)

    async def close(self) -> None:
        """Close the connections to index and store."""
        await self._catalogue.close()
        self._blob_threads.close()
        await asyncio.to_thread(self._store.close)


def _ended(task: asyncio.Task[None]) -> Hook:
    async def end() -> None:
        task.cancel()
        await asyncio.wait([task])

    return end


def _open_store(settings: RegistrySettings) -> ObjectStore:
    access_key, secret_key = settings.store_access_key, settings.store_secret_key
    return open_store(
        settings.store_url,
        access_key=access_key.get_secret_value() if access_key else None,
        secret_key=secret_key.get_secret_value() if secret_key else None,
    )
