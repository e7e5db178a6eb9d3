"""The registry put together: store and index below, rules in the middle, servicers on top."""

from __future__ import annotations

import asyncio

from lorafleet.registry.v1 import adapter_pb2_grpc, base_model_pb2_grpc, file_pb2_grpc
from services.common.index_connection import open_index
from services.common.server import ServiceHost
from services.common.store import ObjectStore, open_store
from services.registry.adapters import Adapters
from services.registry.aliases import Aliases
from services.registry.bases import Bases
from services.registry.blobs import Blobs
from services.registry.catalogue import Catalogue
from services.registry.config import RegistrySettings
from services.registry.files import Files
from services.registry.index import Index
from services.registry.lookup import Lookup
from services.registry.servicers import AdapterServicer, BaseModelServicer, FileServicer

SERVICES = (
    "lorafleet.registry.v1.BaseModelService",
    "lorafleet.registry.v1.AdapterService",
    "lorafleet.registry.v1.FileService",
)


class Registry:
    """The objects of one registry process."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._settings = settings
        self._store = _open_store(settings)
        self._catalogue = Catalogue(self._store, Index(open_index(settings.redis_url)))
        self._is_store_ready = False

    async def register(self, host: ServiceHost) -> None:
        """Add the servicers to `host`, which is ready while the store and the index can be used."""
        limits = self._settings.limits()
        blobs = Blobs(self._store)
        bases = Bases(self._catalogue, limits)
        lookup = Lookup(self._catalogue)
        adapters = Adapters(self._catalogue, lookup, blobs, bases, limits)
        files = Files(self._catalogue, blobs)
        scratch_dir = self._settings.scratch_dir
        aliases = Aliases(self._catalogue, lookup)
        base_model_pb2_grpc.add_BaseModelServiceServicer_to_server(BaseModelServicer(bases), host.server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(
            # The calls of later versions are not overridden: they answer UNIMPLEMENTED.
            AdapterServicer(lookup, adapters, aliases, scratch_dir),  # type: ignore[abstract]
            host.server,
        )
        file_pb2_grpc.add_FileServiceServicer_to_server(
            FileServicer(files, blobs, limits, scratch_dir),  # type: ignore[abstract]
            host.server,
        )
        host.on_close(self.close)
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

    async def close(self) -> None:
        """Close the connections to index and store."""
        await self._catalogue.close()
        await asyncio.to_thread(self._store.close)


def _open_store(settings: RegistrySettings) -> ObjectStore:
    access_key, secret_key = settings.store_access_key, settings.store_secret_key
    return open_store(
        settings.store_url,
        access_key=access_key.get_secret_value() if access_key else None,
        secret_key=secret_key.get_secret_value() if secret_key else None,
    )
