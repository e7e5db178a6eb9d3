"""What `python -m services.registry` runs: the service, or maintenance that prints what it did."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable

from services.common import logs
from services.common.errors import LorafleetError
from services.common.server import EXIT_FAILED, EXIT_OK, serve
from services.registry.config import RegistrySettings
from services.registry.service import SERVICES, Registry

Verb = Callable[[Registry], Awaitable[int]]


async def serve_registry(settings: RegistrySettings) -> int:
    """Serve until a signal; return the exit code."""
    try:
        registry = Registry(settings)
    except LorafleetError as error:
        sys.stderr.write(f"cannot start: {error}\n")
        return EXIT_FAILED
    return await serve("registry", settings, registry.register, services=SERVICES)


async def maintain(settings: RegistrySettings, verb: Verb) -> int:
    """Open the store, do one piece of maintenance and return the exit code."""
    logs.configure("registry", settings.log_level)
    try:
        registry = Registry(settings)
        try:
            return await verb(registry)
        finally:
            await registry.close()
    except LorafleetError as error:
        sys.stderr.write(f"failed: {error}\n")
        return EXIT_FAILED


async def reindex(registry: Registry) -> int:
    """Rebuild the index from the store."""
    sys.stdout.write(f"{await registry.reindex()} records indexed\n")
    return EXIT_OK


async def verify(registry: Registry) -> int:
    """Hash everything again; damage is a failure."""
    found = await registry.verify()
    sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return EXIT_FAILED if found.damages else EXIT_OK


async def collect(registry: Registry, grace_seconds: float) -> int:
    """Remove bytes that nothing has named for so long."""
    sys.stdout.write(json.dumps(dataclasses.asdict(await registry.collect(grace_seconds)), indent=2) + "\n")
    return EXIT_OK
