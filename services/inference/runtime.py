"""What serves: the engine on its thread, and what surrounds it. Built once, off the event loop."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from transformers.utils.logging import disable_progress_bar

from lorafleet.inference.v1.inference_service_pb2 import EngineStatus, TierUsage
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.base_model_pb2 import BaseModel
from services.common.base_models import base_model
from services.common.errors import Unavailable
from services.common.fingerprint import fingerprint_base
from services.common.prompts import PromptEncoder
from services.inference.admission import Admission
from services.inference.assembly import build_engine
from services.inference.conversion import Converter
from services.inference.driver import Driver
from services.inference.engine.engine import Engine
from services.inference.fetcher import RegistryFetcher
from services.inference.residency import Residency
from services.inference.resolver import AdapterResolver, ResolverLimits
from services.inference.settings import InferenceSettings
from services.inference.sources import AdapterSources

# bitsandbytes' block size, with which the loader quantises.
_RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """What loading takes long for, and needs neither an event loop nor the registry."""

    engine: Engine
    encoder: PromptEncoder
    fetcher: RegistryFetcher
    sources: AdapterSources
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
    return LoadedBase(build_engine(settings, fetcher), encoder, fetcher, sources, record)


class Runtime:
    """A loaded base in service."""

    def __init__(self, settings: InferenceSettings, base: LoadedBase, registry: grpc.aio.Channel) -> None:
        """Put the parts together; the engine's thread starts with `start`."""
        digest = base.record.fingerprint.digest
        self.base_name = settings.base_name
        self.base_fingerprint_digest = digest
        self.encoder = base.encoder
        self.driver = Driver(base.engine, max_queued_requests=settings.max_queued_requests)
        self.converter = Converter(base.encoder.token_bytes, base.encoder.eos_token_ids)
        self.residency = Residency(base.engine.adapters, base.sources)
        self._resolver = AdapterResolver(
            AdapterServiceStub(registry),
            base.sources,
            digest,
            ResolverLimits(
                timeout_seconds=settings.resolve_timeout_seconds,
                fresh_seconds=settings.resolve_fresh_seconds,
                stale_seconds=settings.resolve_stale_seconds,
            ),
        )
        self.admission = Admission(base.encoder, self._resolver, base.engine.limits)
        self.resolve = self._resolver.resolve
        self._settings = settings
        self._engine = base.engine
        self._fetcher = base.fetcher
        self._start_time = Timestamp()

    def start(self) -> None:
        """Start the engine's thread."""
        self._start_time.FromNanoseconds(time.time_ns())
        self.driver.start()

    async def stop(self) -> None:
        """End the downloads and the engine's thread."""
        self._fetcher.close()
        await asyncio.to_thread(self.driver.stop)

    def status(self) -> EngineStatus:
        """Return the engine's counters and gauges as of its latest step."""
        stats, adapters = self.driver.stats(), self._engine.adapters.stats()
        settings = self._settings
        used_blocks = stats.kv_blocks_total - stats.kv_blocks_free
        return EngineStatus(
            base_model=self.base_name,
            base_fingerprint_digest=self.base_fingerprint_digest,
            device=settings.torch_device.type,
            running=stats.running,
            queued=stats.waiting - stats.waiting_for_adapter,
            waiting_for_adapter=stats.waiting_for_adapter,
            kv=TierUsage(
                used_bytes=used_blocks * stats.kv_block_bytes,
                budget_bytes=stats.kv_blocks_total * stats.kv_block_bytes,
            ),
            adapters_device=TierUsage(
                used_bytes=adapters.device_used_bytes, budget_bytes=settings.adapter_device_bytes
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
