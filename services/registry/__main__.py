"""`python -m services.registry` serves; `python -m services.registry reindex` rebuilds the index and ends."""

from __future__ import annotations

import asyncio
import sys

from services.common import logs
from services.common.config import load
from services.common.errors import LorafleetError
from services.common.server import EXIT_FAILED, EXIT_OK, serve
from services.registry.config import RegistrySettings
from services.registry.service import SERVICES, Registry

EXIT_USAGE = 2


def main(arguments: list[str]) -> int:
    """Run what the arguments ask for and return the exit code."""
    if arguments not in ([], ["reindex"]):
        sys.stderr.write("usage: python -m services.registry [reindex]\n")
        return EXIT_USAGE
    settings = load(RegistrySettings)
    if arguments:
        return asyncio.run(_reindex(settings))
    return asyncio.run(_serve(settings))


async def _serve(settings: RegistrySettings) -> int:
    try:
        registry = Registry(settings)
    except LorafleetError as error:
        sys.stderr.write(f"cannot start: {error}\n")
        return EXIT_FAILED
    return await serve("registry", settings, registry.register, services=SERVICES)


async def _reindex(settings: RegistrySettings) -> int:
    logs.configure("registry", settings.log_level)
    try:
        registry = Registry(settings)
        try:
            num_records = await registry.reindex()
        finally:
            await registry.close()
    except LorafleetError as error:
        sys.stderr.write(f"cannot rebuild the index: {error}\n")
        return EXIT_FAILED
    sys.stdout.write(f"{num_records} records indexed\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
