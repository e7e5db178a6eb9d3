"""What serves: the engine on its thread, and what surrounds it. Built once, off the event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from transformers.utils.logging import disable_progress_bar

from lorafleet.inference.v1.inference_service_pb2 import EngineStatus, TierUsage
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.base_model_pb2 import BaseModel
from services.common.base_models import base_model
from services.common.errors import Unavailable
from services.common.failpoints import failpoint
from services.common.fingerprint import fingerprint_base
from services.common.ids import new_id
from services.common.index_connection import open_index
from services.common.prompts import PromptEncoder
from services.inference.adapters.entry import AdapterState
from services.inference.admission import Admission
from services.inference.assembly import build_engine
from services.inference.background import Background
from services.inference.constraints.compiler import ConstraintCompiler
from services.inference.constraints.vocabulary import Vocabulary
from services.inference.conversion import Converter
from services.inference.driver import Driver
from services.inference.engine.engine import Engine
from services.inference.event_prefetch import EventPrefetch
from services.inference.fetcher import RegistryFetcher
from services.inference.meters import EngineMeters
from services.inference.pins import PinRecord
from services.inference.presence import Load, Presence
from services.inference.registry_leases import RegistryLeases
from services.inference.residency import Residency
from services.inference.resolver import AdapterResolver, ResolverLimits
from services.inference.settings import InferenceSettings
from services.inference.sources import AdapterSource, AdapterSources

_logger = logging.getLogger("lorafleet.inference")

PINS_FILE = "pins.json"
_IN_MEMORY = frozenset({AdapterState.HOST, AdapterState.DEVICE})
_RETRY_AFTER_SECONDS = 1.0
_SWITCH_INTERVAL_SECONDS = 1e-4


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """What loading takes long for, and needs neither an event loop nor the registry."""

    engine: Engine
    encoder: PromptEncoder
    fetcher: RegistryFetcher
    sources: AdapterSources
    pins: PinRecord
    record: BaseModel


def load(settings: InferenceSettings) -> LoadedBase:
    """Load and fingerprint the base; blocks for as long as its weights take to read.

    Raises:
        LorafleetError: the base cannot be served, e.g. `base_not_found`, `missing_file`, `kv_too_small`.
    """
    # Bars are for terminals; this process writes JSON lines.
    disable_progress_bar()
    fingerprint = fingerprint_base(settings.base_path, settings.base_quantization)
    record = base_model(settings.base_name, settings.base_path, fingerprint)
    encoder = PromptEncoder.load(settings.base_path)
    sources = AdapterSources()
    fetcher = RegistryFetcher(
        settings.registry_target,
        sources,
        timeout_seconds=settings.fetch_timeout_seconds,
        tls=settings.peer_tls,
    )
    failpoint("base.loading")
    engine = build_engine(settings, fetcher)
    _note_origins(engine, sources)
    return LoadedBase(
        engine, encoder, fetcher, sources, PinRecord(_pins_path(settings), fingerprint.digest), record
    )


def settle_interpreter() -> None:
    """Set the process's interpreter for an engine's thread beside others, once the base is loaded.

    The thread gives the interpreter up at every kernel, a dozen times in a step, and another thread that is
    busy then keeps it for its whole turn, of 5 ms by default. And every full garbage collection would look at
    all of torch and transformers again.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    gc.collect()
    gc.freeze()


class Runtime:
    """A loaded base in service."""

    def __init__(self, settings: InferenceSettings, base: LoadedBase, registry: grpc.aio.Channel) -> None:
        """Put the parts together; the engine's thread starts with `start`."""
        digest = base.record.fingerprint.digest
        self.base_name = settings.base_name
        self.base_fingerprint_digest = digest
        self.encoder = base.encoder
        self.driver = Driver(
            base.engine,
            max_queued_requests=settings.max_queued_requests,
            tenant_queue_share=settings.tenant_queue_share,
        )
        self.converter = Converter(base.encoder.token_bytes, base.encoder.eos_token_ids)
        self.residency = Residency(base.engine.adapters, base.sources, base.pins)
        adapters = AdapterServiceStub(registry)
        self._resolver = AdapterResolver(
            adapters,
            base.sources,
            digest,
            ResolverLimits(
                timeout_seconds=settings.resolve_timeout_seconds,
                fresh_seconds=settings.resolve_fresh_seconds,
                stale_seconds=settings.resolve_stale_seconds,
            ),
        )
        self._constraints = ConstraintCompiler(_vocabulary(base))
        self.admission = Admission(base.encoder, self._resolver, self._constraints, base.engine.limits)
        self.resolve = self._resolver.resolve
        self.resolve_here = self._resolver.resolve_here
        self.replica_id = new_id("replica")
        self._settings = settings
        self._engine = base.engine
        self._fetcher = base.fetcher
        self._start_time = Timestamp()
        self._leases = RegistryLeases(adapters, self._engine.adapters, base.sources, self.replica_id)
        self._prefetch = EventPrefetch(
            adapters,
            self._resolver,
            self.residency,
            self._engine.adapters,
            base.sources,
            aliases=settings.prefetch_aliases,
            new_versions=settings.prefetch_new_versions,
        )
        self._presence: Presence | None = None
        self._background = Background()

    def start(self) -> None:
        """Start the engine's thread."""
        self._start_time.FromNanoseconds(time.time_ns())
        self.driver.start()

    def attend(self, address: str) -> None:
        """Begin what goes on beside the calls, once they are let in.

        Args:
            address: where routers reach this replica.
        """
        self._background.start(EngineMeters(self.driver.stats).run(), name="metrics")
        self._background.start(self._leases.run(), name="registry leases")
        self._background.start(self.residency.restore(), name="pins")
        for tenant in self._settings.prefetch_tenants:
            self._background.start(self._prefetch.watch(tenant), name=f"prefetch for {tenant}")
        if self._settings.redis_url is not None:
            self._presence = Presence(
                open_index(self._settings.redis_url),
                self.replica_id,
                lambda: self._load(address),
                self._tiers,
            )
            self._background.start(self._presence.run(), name="presence")

    async def drain(self) -> None:
        """Tell routers that no new requests are taken."""
        if self._presence is not None:
            await self._presence.drain()

    async def stop(self) -> None:
        """End what goes on beside the calls, the downloads and the engine's thread."""
        await self._background.stop()
        self._fetcher.close()
        await self._constraints.close()
        await asyncio.to_thread(self.driver.stop)

    def status(self) -> EngineStatus:
        """Return the engine's counters and gauges as of its latest step."""
        stats, adapters = self.driver.stats(), self._engine.adapters.stats()
        settings = self._settings
        used_blocks = stats.kv_blocks_total - stats.kv_blocks_free
        return EngineStatus(
            base_model=self.base_name,
            base_fingerprint_digest=self.base_fingerprint_digest,
            device=settings.device_type,
            running=stats.running,
            queued=stats.waiting - stats.waiting_for_adapter,
            waiting_for_adapter=stats.waiting_for_adapter,
            kv=TierUsage(
                used_bytes=used_blocks * stats.kv_block_bytes,
                budget_bytes=stats.kv_blocks_total * stats.kv_block_bytes,
            ),
            adapters_device=TierUsage(
                used_bytes=adapters.device_used_bytes,
                budget_bytes=settings.device_budget.most_adapter_bytes,
            ),
            adapters_host=TierUsage(
                used_bytes=adapters.host_used_bytes, budget_bytes=settings.adapter_host_bytes
            ),
            adapters_disk=TierUsage(
                used_bytes=adapters.disk_used_bytes, budget_bytes=settings.adapter_disk_bytes
            ),
            generated_tokens=stats.completion_tokens,
            prompt_tokens=stats.prompt_tokens,
            preemptions=stats.preemptions,
            steps=stats.steps,
            max_model_len=self._engine.limits.max_model_len,
            start_time=self._start_time,
            free_kv_blocks=stats.kv_blocks_free,
            total_kv_blocks=stats.kv_blocks_total,
        )

    def _load(self, address: str) -> Load:
        """Return what routers choose by."""
        status = self.status()
        return {
            "address": address,
            "base_model": status.base_model,
            "base_fingerprint_digest": status.base_fingerprint_digest,
            "running": status.running,
            "queued": status.queued,
            "waiting_for_adapter": status.waiting_for_adapter,
            "max_running": self._settings.max_num_seqs,
            "max_requests": self._settings.max_queued_requests,
            "kv_free_bytes": status.kv.budget_bytes - status.kv.used_bytes,
            "device_free_bytes": status.adapters_device.budget_bytes - status.adapters_device.used_bytes,
            "host_free_bytes": status.adapters_host.budget_bytes - status.adapters_host.used_bytes,
        }

    def _tiers(self) -> dict[str, str]:
        """Return the adapters in memory, by digest."""
        tiers = self._engine.adapters.tiers()
        return {digest: tier.value for digest, tier in tiers.items() if tier in _IN_MEMORY}


def _pins_path(settings: InferenceSettings) -> Path:
    return settings.adapter_cache_path / PINS_FILE


def _note_origins(engine: Engine, sources: AdapterSources) -> None:
    """Note where the folders on the disk came from, so that their tenants see them again."""
    for origin in engine.adapters.origins():
        try:
            sources.note(AdapterSource.from_json(origin))
        except ValueError as error:
            _logger.warning("a folder's origin cannot be read", extra={"detail": str(error)})


def _vocabulary(base: LoadedBase) -> Vocabulary:
    encoder = base.encoder
    return Vocabulary(
        tokens=tuple(encoder.token_bytes[token_id] for token_id in range(base.engine.limits.vocab_size)),
        special_token_ids=encoder.special_token_ids,
        eos_token_ids=tuple(sorted(encoder.eos_token_ids)),
    )


class Startup:
    """Holds the runtime once there is one; calls that come earlier are refused."""

    def __init__(self) -> None:
        self._runtime: Runtime | None = None

    def done(self, runtime: Runtime) -> None:
        """Let calls in."""
        self._runtime = runtime

    def require(self) -> Runtime:
        """Return the runtime.

        Raises:
            Unavailable: `base_loading`.
        """
        if self._runtime is None:
            raise Unavailable(
                "base_loading",
                "The base model is still being loaded.",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            )
        return self._runtime
