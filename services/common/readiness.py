"""Readiness: the health service follows what a service needs, from before its start to its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from services.common.errors import LorafleetError

_logger = logging.getLogger("lorafleet.readiness")

Probe = Callable[[], Awaitable[None]]

FIRST_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 5.0
PROBE_TIMEOUT_SECONDS = 5.0
PROBE_INTERVAL_SECONDS = 5.0


class Readiness:
    """Keeps the health status of the named services, and of the whole process (the empty name).

    A service starts NOT_SERVING. It serves once it was declared ready and all probes pass; a probe that fails
    later takes all services back until it passes again.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self.servicer = health_aio.HealthServicer()
        self._declared = dict.fromkeys(services, False)
        self._passing: list[bool] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Lock()

    async def publish(self) -> None:
        """Write the present state to the health servicer."""
        async with self._changed:
            passing = all(self._passing)
            for name, declared in self._declared.items():
                await self._set(name, declared and passing)
            await self._set("", all(self._declared.values()) and passing)

    async def ready(self, *services: str) -> None:
        """Declare services ready; all of them when none is named."""
        await self._declare(services, is_ready=True)

    async def not_ready(self, *services: str) -> None:
        """Take services back; all of them when none is named."""
        await self._declare(services, is_ready=False)

    def ready_when(self, probe: Probe, *, interval_seconds: float = PROBE_INTERVAL_SECONDS) -> None:
        """Hold the process NOT_SERVING until `probe()` returns, and again whenever it raises later.

        It is called with a growing pause while it fails, then every `interval_seconds`. A process whose
        dependency is missing at the start so becomes ready without a restart.
        """
        self._passing.append(False)
        index = len(self._passing) - 1
        self._tasks.append(asyncio.create_task(self._watch(probe, index, interval_seconds)))

    async def shut_down(self) -> None:
        """Report NOT_SERVING for good and stop the probes."""
        await self.servicer.enter_graceful_shutdown()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _declare(self, services: Sequence[str], *, is_ready: bool) -> None:
        for name in services or tuple(self._declared):
            assert name in self._declared, f"{name} is not a service of this server"
            self._declared[name] = is_ready
        await self.publish()

    async def _set(self, name: str, is_serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        await self.servicer.set(name, statuses.SERVING if is_serving else statuses.NOT_SERVING)

    async def _watch(self, probe: Probe, index: int, interval_seconds: float) -> None:
        pause_seconds = FIRST_RETRY_SECONDS
        failed = False
        await self.publish()
        while True:
            passes = await _passes(probe, quiet=failed)
            failed = not passes
            if passes != self._passing[index]:
                self._passing[index] = passes
                await self.publish()
            await asyncio.sleep(interval_seconds if passes else pause_seconds)
            pause_seconds = FIRST_RETRY_SECONDS if passes else min(MAX_RETRY_SECONDS, pause_seconds * 2)


async def _passes(probe: Probe, *, quiet: bool) -> bool:
    """Return whether the probe passes; a failure is logged as a warning when it is new."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
            await probe()
    except Exception as error:  # noqa: BLE001 - whatever a probe raises means: not ready
        reason = error.reason if isinstance(error, LorafleetError) else type(error).__name__
        level = logging.DEBUG if quiet else logging.WARNING
        _logger.log(level, "not ready", extra={"reason": reason, "detail": str(error)})
        return False
    return True
