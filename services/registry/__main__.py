"""`python -m services.registry` serves; with a verb it does one piece of maintenance and ends.

    reindex                      rebuild the index from the store
    verify                       hash everything again and name what is damaged
    gc [--grace-seconds N]       remove bytes that nothing has named for so long

`reindex` and `gc` write, so they refuse to run beside a registry that serves; that one does both by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable

from services.common import logs
from services.common.config import load
from services.common.errors import LorafleetError
from services.common.server import EXIT_FAILED, EXIT_OK, serve
from services.registry.config import RegistrySettings
from services.registry.service import SERVICES, Registry

Verb = Callable[[Registry], Awaitable[int]]


def main(arguments: list[str]) -> int:
    """Run what the arguments ask for and return the exit code."""
    options = _parser().parse_args(arguments)
    settings = load(RegistrySettings)
    match options.verb:
        case None:
            return asyncio.run(_serve(settings))
        case "reindex":
            return asyncio.run(_maintain(settings, _reindex))
        case "verify":
            return asyncio.run(_maintain(settings, _verify))
        case _:
            grace_seconds = (
                settings.gc_grace_seconds if options.grace_seconds is None else options.grace_seconds
            )
            return asyncio.run(_maintain(settings, lambda registry: _collect(registry, grace_seconds)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m services.registry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("reindex")
    verbs.add_parser("verify")
    collect = verbs.add_parser("gc")
    collect.add_argument(
        "--grace-seconds", type=float, help="instead of the setting; 0 only where nothing is under lease"
    )
    return parser


async def _serve(settings: RegistrySettings) -> int:
    try:
        registry = Registry(settings)
    except LorafleetError as error:
        sys.stderr.write(f"cannot start: {error}\n")
        return EXIT_FAILED
    return await serve("registry", settings, registry.register, services=SERVICES)


async def _maintain(settings: RegistrySettings, verb: Verb) -> int:
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


async def _reindex(registry: Registry) -> int:
    sys.stdout.write(f"{await registry.reindex()} records indexed\n")
    return EXIT_OK


async def _verify(registry: Registry) -> int:
    found = await registry.verify()
    sys.stdout.write(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return EXIT_FAILED if found.damages else EXIT_OK


async def _collect(registry: Registry, grace_seconds: float) -> int:
    sys.stdout.write(json.dumps(dataclasses.asdict(await registry.collect(grace_seconds)), indent=2) + "\n")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
