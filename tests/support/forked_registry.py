"""A registry in a process of its own that starts fast: forked off a server that has everything imported."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from services.common import failpoints
from services.common.channels import open_channel
from services.common.server import ServiceHost
from services.registry.service import SERVICES, Registry
from tests.support.registry import Client, Place

START_SECONDS = 60.0


@asynccontextmanager
async def forked_registry(
    place: Place, *, rule: str = "", collect_seconds: float | None = None
) -> AsyncIterator[tuple[ForkServerProcess, Client]]:
    """Run a registry until the end, which kills it.

    Args:
        place: where it keeps its things.
        rule: the failpoint in force once it is ready.
        collect_seconds: the pause between rounds of garbage collection without any grace; None: no rounds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(place, rule, collect_seconds, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert await asyncio.to_thread(ours.poll, START_SECONDS), "the registry did not start"
        async with open_channel(ours.recv()) as channel:
            await asyncio.wait_for(channel.channel_ready(), START_SECONDS)
            yield process, Client(channel, "acme")
    finally:
        ours.close()
        process.kill()
        await asyncio.to_thread(process.join)
        process.close()


def peak_bytes(process: ForkServerProcess) -> int:
    """The most memory that a process has held, since `forget_peak` where that was called."""
    return _status_bytes(process, "VmHWM")


def resident_bytes(process: ForkServerProcess) -> int:
    """The memory that a process holds."""
    return _status_bytes(process, "VmRSS")


def forget_peak(process: ForkServerProcess) -> None:
    """Begin the peak of a process anew, with what it holds now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")


def _status_bytes(process: ForkServerProcess, name: str) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name}")


def _serve(place: Place, rule: str, collect_seconds: float | None, announce: Connection) -> None:
    asyncio.run(_serve_for_ever(place, rule, collect_seconds, announce))


async def _serve_for_ever(
    place: Place, rule: str, collect_seconds: float | None, announce: Connection
) -> None:
    settings = place.settings()
    host = ServiceHost(settings, SERVICES)
    registry = Registry(settings)
    await registry.register(host)
    await registry.probe()
    announce.send(str(await host.start()))
    # From here on: becoming ready is not what is tested.
    failpoints.arm(rule)
    if collect_seconds is None:
        await asyncio.Event().wait()
        return
    while True:
        await asyncio.sleep(collect_seconds)
        await registry.collect(grace_seconds=0.0)
