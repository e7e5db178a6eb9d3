"""The trainer's parts, put together, with the tasks that run beside the calls."""

from __future__ import annotations

import asyncio
import logging

from lorafleet.trainer.v1.trainer_service_pb2_grpc import add_TrainerServiceServicer_to_server
from services.common.call_context import call_scope
from services.common.index_connection import open_index, ping
from services.common.server import ServiceHost
from services.trainer.bases import BaseCatalog, TrainableBase
from services.trainer.book import JobBook
from services.trainer.checkpoint_publisher import CheckpointPublisher
from services.trainer.config import TrainerSettings
from services.trainer.estimator import Estimator
from services.trainer.index import JobIndex
from services.trainer.journal import Journal
from services.trainer.lease import Holder
from services.trainer.registry_client import RegistryClient
from services.trainer.requests import RequestChecker
from services.trainer.servicer import TrainerServicer
from services.trainer.telemetry import JobMeasures
from services.trainer.validator import DataCheck, Validator
from services.trainer.worker import Worker

_logger = logging.getLogger("lorafleet.trainer")

SERVICE = "lorafleet.trainer.v1.TrainerService"
# The bases belong to no tenant; the registry wants to know all the same who calls.
OWN_TENANT = "lorafleet-trainer"


class TrainerService:
    """Owns the connections, the servicer, the validator and the workers of one process."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._store = settings.open_store()
        self._redis = open_index(settings.redis_url)
        self._registry = RegistryClient(settings.registry_target, settings.peer_tls)
        self._bases = BaseCatalog()
        self._loaded: list[TrainableBase] = []
        index = JobIndex(self._redis, lease_seconds=settings.lease_seconds)
        self._book = JobBook(Journal(self._store), index, Holder.this_process())
        check = DataCheck(self._registry, settings)
        in_work: set[str] = set()
        estimator = Estimator(index, self._registry, settings)
        self._validator = Validator(self._book, check, self._bases, estimator, in_work)
        measures = JobMeasures()
        self._workers = [Worker(self._book, settings, in_work, measures) for _ in range(settings.concurrency)]
        self._publisher = CheckpointPublisher(self._book, self._store, self._registry, self._bases, settings)
        checker = RequestChecker(self._bases, self._registry, settings)
        self._servicer = TrainerServicer(self._book, checker, check, estimator, self._publisher)
        self._tasks: list[asyncio.Task[None]] = []

    async def register(self, host: ServiceHost) -> None:
        """Join a host: it serves once index, store and registry were reached.

        Raises:
            LorafleetError, OSError: a base cannot be used.
        """
        self._loaded = await self._bases.load(self._settings.bases, self._settings.base_quantization)
        add_TrainerServiceServicer_to_server(self._servicer, host.server)
        host.ready_when(self._probe_stores)
        host.ready_when(self._probe_registry)
        host.on_drain(self._drain)
        host.on_close(self._close)
        await host.ready()

    async def _probe_stores(self) -> None:
        await ping(self._redis)
        await asyncio.to_thread(self._store.ready)

    async def _probe_registry(self) -> None:
        """Pass once the registry knows our bases; the first pass sets validator and workers going."""
        if self._tasks:
            return
        with call_scope(tenant=OWN_TENANT):
            for base in self._loaded:
                await self._registry.create_base(base)
        await asyncio.to_thread(self._store.ready)
        await self._book.ensure_indexed()
        self._tasks = [
            asyncio.create_task(self._validator.run()),
            *[asyncio.create_task(worker.run()) for worker in self._workers],
        ]
        names = ", ".join(f"{base.name} {base.fingerprint.digest}" for base in self._loaded)
        _logger.info("ready for jobs", extra={"bases": names})

    async def _drain(self) -> None:
        self._validator.stop()
        for worker in self._workers:
            worker.stop()
        await asyncio.gather(*self._tasks, self._publisher.stop())

    async def _close(self) -> None:
        await self._registry.close()
        await self._redis.aclose()
        self._store.close()
