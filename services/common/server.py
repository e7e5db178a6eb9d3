"""The life of a gRPC server process: build, register, listen, become ready, drain, end.

A service's `__main__` is three lines: load the settings, then `sys.exit(asyncio.run(serve(...)))`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.common import logs, metrics
from services.common.config import Address, ServiceSettings
from services.common.errors import FailedPrecondition, LorafleetError
from services.common.readiness import PROBE_INTERVAL_SECONDS, Probe, Readiness
from services.common.rpc import CallInterceptor, DrainLayer, standard_layers
from services.common.rpc.call import Layer
from services.common.rpc.tenant import tenant_layer
from services.common.telemetry import Telemetry
from services.common.transport import KEEPALIVE, KeepAlive, server_options

_logger = logging.getLogger("lorafleet.server")

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

EXIT_OK = 0
EXIT_FAILED = 1

Hook = Callable[[], Awaitable[None]]

_info = metrics.up_down_counter("lorafleet.server.info")


class ServiceHost:
    """A gRPC server with health, reflection and our interceptor, and the hooks of its end.

    Tests start one directly; `serve` adds signals, logs and telemetry.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        services: Sequence[str],
        *,
        keepalive: KeepAlive = KEEPALIVE,
        caller: Layer = tenant_layer,
        checks_callers: bool = False,
    ) -> None:
        """Build the server; nothing listens yet.

        Args:
            settings: where to listen and for how long calls may run.
            services: full names (`lorafleet.registry.v1.Registry`) for health and reflection.
            keepalive: how clients that vanished are found.
            caller: the layer that finds out for whom a call is.
            checks_callers: whether it asks for a secret; then TLS without client certificates will do beyond
                loopback.

        Raises:
            FailedPrecondition: `insecure_bind`, where others could reach a server that trusts its callers.
        """
        _check_bind(settings, checks_callers=checks_callers)
        self._settings = settings
        self._services = tuple(services)
        self._readiness = Readiness(services)
        self._drain = DrainLayer()
        self._drain_hooks: list[Hook] = []
        self._close_hooks: list[Hook] = []
        self.bound: Address | None = None
        """Where it listens, from `start` on."""
        self.server = grpc.aio.server(
            interceptors=[
                CallInterceptor(
                    standard_layers(
                        unary_timeout_seconds=settings.unary_timeout_seconds,
                        stream_timeout_seconds=settings.stream_timeout_seconds,
                        drain=self._drain,
                        caller=caller,
                    )
                )
            ],
            options=server_options(keepalive),
        )

    def on_drain(self, hook: Hook) -> None:
        """Have `hook` awaited when the server stops admitting work, before calls in flight are waited for."""
        self._drain_hooks.append(hook)

    def on_close(self, hook: Hook) -> None:
        """Have `hook` awaited after the last call; the hooks run in reverse order of registration."""
        self._close_hooks.append(hook)

    async def ready(self, *services: str) -> None:
        """Report services (all when none is named) as SERVING, so far as the probes pass."""
        await self._readiness.ready(*services)

    async def not_ready(self, *services: str) -> None:
        """Report services (all when none is named) as NOT_SERVING."""
        await self._readiness.not_ready(*services)

    def ready_when(self, probe: Probe, *, interval_seconds: float = PROBE_INTERVAL_SECONDS) -> None:
        """Hold everything NOT_SERVING while `probe()` raises; see `Readiness.ready_when`."""
        self._readiness.ready_when(probe, interval_seconds=interval_seconds)

    async def start(self) -> Address:
        """Listen and return the bound address.

        Raises:
            FailedPrecondition: the TLS files cannot be used.
            RuntimeError: the address cannot be bound.
        """
        tls, wanted = self._settings.server_tls, self._settings.address
        credentials = None if tls is None else tls.credentials()
        health_pb2_grpc.add_HealthServicer_to_server(self._readiness.servicer, self.server)
        _add_reflection(self.server, self._services)
        await self._readiness.publish()
        if credentials is None:
            port = self.server.add_insecure_port(str(wanted))
        else:
            port = self.server.add_secure_port(str(wanted), credentials)
        await self.server.start()
        _info.add(1, {"security": security(self._settings), "insecure_bind": self._settings.insecure_bind})
        self.bound = Address(wanted.host, port)
        return self.bound

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Drain and close: not ready, no admission, calls in flight end, then whatever they used.

        Args:
            grace_seconds: how long calls in flight may go on; the setting when None.
        """
        grace_seconds = self._settings.grace_seconds if grace_seconds is None else grace_seconds
        await self._readiness.shut_down()
        self._drain.begin()
        for hook in self._drain_hooks:
            await _run_logged(hook)
        await self.server.stop(grace_seconds)
        for hook in reversed(self._close_hooks):
            await _run_logged(hook)


async def serve(
    service_name: str,
    settings: ServiceSettings,
    register: Callable[[ServiceHost], Awaitable[None]],
    *,
    services: Sequence[str],
) -> int:
    """Run one service until SIGTERM or SIGINT and return the exit code.

    Args:
        service_name: for logs and traces, e.g. `registry`.
        settings: the service's own settings.
        register: adds servicers to `host.server`, calls `host.ready()` (without it the service stays
            NOT_SERVING), adds probes by `host.ready_when(probe)`, and registers hooks. It must not wait for
            other services.
        services: full names of the gRPC services.
    """
    logs.configure(service_name, settings.log_level)
    stop_asked = _stop_on_signals()
    try:
        telemetry = start_telemetry(service_name, settings)
    except (LorafleetError, OSError) as error:
        _logger.error("cannot start", extra={"detail": str(error)})
        return EXIT_FAILED
    try:
        host = ServiceHost(settings, services)
        await register(host)
        address = await host.start()
    except (LorafleetError, OSError, RuntimeError) as error:
        _logger.error("cannot start", extra={"detail": str(error)})
        await asyncio.to_thread(telemetry.shutdown)
        return EXIT_FAILED
    _logger.info(
        "listening",
        extra={
            "address": str(address),
            "pid": os.getpid(),
            "security": security(settings),
            "insecure_bind": settings.insecure_bind,
            "metrics_address": telemetry.metrics_address and str(telemetry.metrics_address),
        },
    )
    publish_address(settings, address)
    signal_name = await stop_asked
    _logger.info("draining", extra={"signal": signal_name, "grace_seconds": settings.grace_seconds})
    await host.stop()
    await asyncio.to_thread(telemetry.shutdown)
    _logger.info("stopped")
    return EXIT_OK


def _stop_on_signals() -> asyncio.Future[str]:
    """Return a future that the first SIGTERM or SIGINT resolves to its name."""
    loop = asyncio.get_running_loop()
    stop_asked: asyncio.Future[str] = loop.create_future()

    def stop(number: signal.Signals) -> None:
        if not stop_asked.done():
            stop_asked.set_result(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stop_asked


def security(settings: ServiceSettings) -> str:
    """Return how callers connect to a gRPC server with these settings: `plaintext`, `tls` or `mutual_tls`."""
    tls = settings.server_tls
    if tls is None:
        return "plaintext"
    return "tls" if tls.client_ca_file is None else "mutual_tls"


def start_telemetry(service_name: str, settings: ServiceSettings) -> Telemetry:
    """Start the traces and metrics of a process.

    Raises:
        FailedPrecondition: `insecure_bind`, where others could read the metrics.
        OSError: the metrics address cannot be bound.
    """
    address = settings.metrics_address
    if address is not None and not address.is_loopback and not settings.insecure_bind:
        raise _refused_bind(settings, "metrics_listen", address, "metrics are shown to whoever asks")
    return Telemetry(service_name, settings.otlp_endpoint, address)


def _check_bind(settings: ServiceSettings, *, checks_callers: bool) -> None:
    if settings.address.is_loopback or settings.insecure_bind or security(settings) == "mutual_tls":
        return
    if checks_callers:
        if security(settings) == "plaintext":
            raise _refused_bind(settings, "listen", settings.address, "keys would travel in plain text")
        return
    trust = "this server trusts whoever calls it; use mutual TLS (TLS_CLIENT_CA_FILE)"
    raise _refused_bind(settings, "listen", settings.address, trust)


def _refused_bind(settings: ServiceSettings, field: str, address: Address, why: str) -> FailedPrecondition:
    prefix = settings.model_config["env_prefix"]
    return FailedPrecondition(
        "insecure_bind",
        f"{address} can be reached from other machines, and {why}; listen on a loopback address, or set "
        f"{prefix}INSECURE_BIND=true inside a closed network",
        field=field,
        value=str(address),
    )


def publish_address(settings: ServiceSettings, address: Address) -> None:
    """Write the bound address where the one who started us looks for it; a reader never sees half of it."""
    if settings.port_file is None:
        return
    partial = settings.port_file.with_name(settings.port_file.name + ".partial")
    partial.write_text(f"{address}\n", encoding="ascii")
    partial.replace(settings.port_file)


def _add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Serve reflection as v1alpha, which the library offers, and as v1, whose messages are the same."""
    servicer = reflection.aio.ReflectionServicer((*services, HEALTH_SERVICE, reflection.SERVICE_NAME))
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (reflection.SERVICE_NAME, REFLECTION_V1):
        handlers = grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method})
        server.add_generic_rpc_handlers((handlers,))


async def _run_logged(hook: Hook) -> None:
    """Run one hook; an error in it must not keep the others from running."""
    try:
        await hook()
    except Exception:
        _logger.exception("a hook failed")


__all__ = ["EXIT_FAILED", "EXIT_OK", "ServiceHost", "security", "serve", "start_telemetry"]
