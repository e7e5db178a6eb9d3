"""`python -m services.registry` serves; with a verb it does one piece of maintenance and ends.

    reindex                      rebuild the index from the store
    verify                       hash everything again and name what is damaged
    gc [--grace-seconds N]       remove bytes that nothing has named for so long

`reindex` and `gc` write, so they refuse to run beside a registry that serves; that one does both by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys

from services.common.config import load
from services.registry.config import RegistrySettings


def main(arguments: list[str]) -> int:
    """Run what the arguments ask for and return the exit code."""
    options = _parser().parse_args(arguments)
    settings = load(RegistrySettings)
    # Imported here: bad settings need not wait for the service's libraries.
    from services.registry import program

    match options.verb:
        case None:
            return asyncio.run(program.serve_registry(settings))
        case "reindex":
            return asyncio.run(program.maintain(settings, program.reindex))
        case "verify":
            return asyncio.run(program.maintain(settings, program.verify))
        case _:
            grace_seconds = (
                settings.gc_grace_seconds if options.grace_seconds is None else options.grace_seconds
            )
            collect = functools.partial(program.collect, grace_seconds=grace_seconds)
            return asyncio.run(program.maintain(settings, collect))


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
