"""`python -m services.gateway [serve | create-key | revoke-key]`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Iterator

from services.common.config import load
from services.common.errors import LorafleetError
from services.common.store import open_store
from services.gateway.config import GatewaySettings
from services.gateway.keys import KeyRing, Scope
from services.gateway.server import EXIT_FAILED, EXIT_OK, serve, store_credentials


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    options = _parser().parse_args(arguments)
    settings = load(GatewaySettings)
    if options.verb in (None, "serve"):
        return asyncio.run(serve(settings))
    try:
        with _key_ring(settings) as keys:
            if options.verb == "create-key":
                scopes = [Scope(scope) for scope in options.scopes.split(",")]
                lifetime = None if options.days is None else options.days * 24 * 3600
                sys.stdout.write(keys.create(options.tenant, scopes, lifetime_seconds=lifetime) + "\n")
            else:
                keys.revoke(options.key_id)
    except LorafleetError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description=__doc__)
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("serve", help="serve the HTTP API (the default)")
    create = verbs.add_parser("create-key", help="make an API key and print it, once")
    create.add_argument("--tenant", default="default", help="whom it belongs to")
    create.add_argument("--scopes", default=",".join(Scope), help="what it may do, separated by commas")
    create.add_argument("--days", type=int, help="days until it expires; never when absent")
    revoke = verbs.add_parser("revoke-key", help="make an API key useless")
    revoke.add_argument("key_id", help="the part between the first two hyphens of the key")
    return parser


@contextlib.contextmanager
def _key_ring(settings: GatewaySettings) -> Iterator[KeyRing]:
    store = open_store(settings.store_url, **store_credentials(settings))
    try:
        store.ready()
        yield KeyRing(store, settings.key_pepper.get_secret_value(), settings.key_cache_seconds)
    finally:
        store.close()


if __name__ == "__main__":
    sys.exit(main())
