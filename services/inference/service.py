"""The life of the inference process: listen, load the base, register it, serve, end if the engine does."""

from __future__ import annotations

import asyncio
import logging
import signal

from lorafleet.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceStub
from services.common import server
from services.common.base_models import register_base
from services.common.channels import open_channel
from services.common.errors import Internal
from services.common.server import EXIT_FAILED, ServiceHost
from services.inference.runtime import Runtime, Startup, load, settle_interpreter
from services.inference.servicer import SERVICE, InferenceServicer
from services.inference.settings import InferenceSettings

_logger = logging.getLogger("lorafleet.inference")

IDEMPOTENT_METHODS = (
    "lorafleet.registry.v1.AdapterService/ResolveVersion",
    "lorafleet.registry.v1.BaseModelService/CreateBaseModel",
)
_HEALTH_INTERVAL_SECONDS = 1.0


class InferenceService:
    """Brings the service up on a host that listens already, and takes it down with it.

    With `owns_process` the interpreter is set for an engine's thread (`settle_interpreter`).
    """

    def __init__(self, settings: InferenceSettings, *, owns_process: bool = False) -> None:
        self._settings = settings
        self._owns_process = owns_process
        self._startup = Startup()
        self._work: asyncio.Task[None] | None = None
        self.failed = False

    async def register(self, host: ServiceHost) -> None:
        """Add the servicer and begin to load the base; the host is NOT_SERVING until that is done."""
        servicer = InferenceServicer(self._startup)
        add_InferenceServiceServicer_to_server(servicer, host.server)
        host.on_drain(servicer.drain)
        host.on_close(self._close)
        self._work = asyncio.create_task(self._run(host))

    async def _run(self, host: ServiceHost) -> None:
        try:
            await self._serve(host)
        except Exception:
            _logger.exception("the service cannot go on")
            self.failed = True
            # The way of every end: the host drains what can still be answered, and the process exits.
            signal.raise_signal(signal.SIGTERM)

    async def _serve(self, host: ServiceHost) -> None:
        base = await asyncio.to_thread(load, self._settings)
        if self._owns_process:
            await asyncio.to_thread(settle_interpreter)
        async with open_channel(
            self._settings.registry_target,
            idempotent_methods=IDEMPOTENT_METHODS,
            tls=self._settings.peer_tls,
        ) as registry:
            runtime = Runtime(self._settings, base, registry)
            runtime.start()
            try:
                await register_base(BaseModelServiceStub(registry), base.record)
                self._startup.done(runtime)
                runtime.attend(self._settings.advertised_address or str(host.bound or self._settings.address))
                host.on_drain(runtime.drain)
                await host.ready()
                _logger.info("serving", extra={"base": runtime.base_name, "device": runtime.status().device})
                await _until_unhealthy(runtime)
                await host.not_ready()
                raise Internal("engine_failed", "the engine's thread has ended or its steps keep failing")
            finally:
                await runtime.stop()

    async def _close(self) -> None:
        assert self._work is not None
        self._work.cancel()
        await asyncio.gather(self._work, return_exceptions=True)


async def _until_unhealthy(runtime: Runtime) -> None:
    while runtime.driver.healthy:  # noqa: ASYNC110 - the engine's thread must not wait to tell us
        await asyncio.sleep(_HEALTH_INTERVAL_SECONDS)


async def run(settings: InferenceSettings) -> int:
    """Serve until SIGTERM, or until the base cannot be loaded or the engine fails; return the exit code."""
    service = InferenceService(settings, owns_process=True)
    exit_code = await server.serve("inference", settings, service.register, services=[SERVICE])
    return EXIT_FAILED if service.failed else exit_code
