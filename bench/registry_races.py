"""Races that must have the right number of winners, on either store.

Publishing: so many publishers of one adapter name at once; each must get a version of its own, none lost.
Aliases: so many compare-and-set moves from one generation at once; exactly one may win. Every round is
checked, and the last line is JSON.

    python -m bench.registry_races --racers 64 --rounds 200
    python -m bench.registry_races --store s3://BUCKET?endpoint=http://HOST:PORT --access-key K --secret-key S
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from services.common.errors import LorafleetError
from services.common.valkey import EmbeddedValkey
from tests.support.registry import Client, Place, Upload, registry_client


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all rounds came to."""

    racers: int
    rounds: int
    published: int
    lost_or_double_versions: int
    alias_steps: int
    steps_without_one_winner: int
    seconds: float


def main() -> None:
    """Race on the store that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--racers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--store", default="", help="store URL; a folder when left out")
    parser.add_argument("--access-key")
    parser.add_argument("--secret-key")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey.start(Path(folder) / "valkey") as valkey:
        url = options.store or f"file://{folder}/objects"
        place = Place(valkey.url, url, options.access_key, options.secret_key)
        outcome = asyncio.run(race(place, racers=options.racers, rounds=options.rounds))
    kind = "s3" if options.store.startswith("s3:") else "directory"
    print(json.dumps({"benchmark": "registry_races", "store": kind} | asdict(outcome)))


async def race(place: Place, *, racers: int, rounds: int) -> Outcome:
    """Run the rounds against a registry at `place`."""
    started = time.perf_counter()
    async with registry_client(place, tenant="race") as client:
        wrong_versions = sum([await _publish_round(client, racers, number) for number in range(rounds)])
        wrong_steps = sum([await _alias_round(client, racers, number) for number in range(rounds)])
    return Outcome(
        racers=racers,
        rounds=rounds,
        published=racers * rounds,
        lost_or_double_versions=wrong_versions,
        alias_steps=rounds,
        steps_without_one_winner=wrong_steps,
        seconds=round(time.perf_counter() - started, 1),
    )


async def _publish_round(client: Client, racers: int, number: int) -> int:
    """Return how many publishers of this round did not get a version of their own that serves their bytes."""
    uploads = [Upload.made(number * racers + racer) for racer in range(racers)]
    versions = await asyncio.gather(*(client.publish(upload) for upload in uploads))
    first = number * racers + 1
    expected = set(range(first, first + racers))
    wrong = racers - len(expected & {version.version for version in versions})
    resolved = await asyncio.gather(*(client.resolve(f"billing:{version.version}") for version in versions))
    return wrong + sum(
        version.digest != found.digest for version, found in zip(versions, resolved, strict=True)
    )


async def _alias_round(client: Client, racers: int, generation: int) -> int:
    """Return 1 where not exactly one of the moves from `generation` won."""
    moves = await asyncio.gather(
        *(_try_to_move(client, version, generation) for version in range(1, racers + 1))
    )
    return int(sum(moves) != 1)


async def _try_to_move(client: Client, version: int, generation: int) -> bool:
    try:
        await client.set_alias("prod", version, expected=generation)
    except LorafleetError as error:
        if error.reason != "alias_conflict":
            raise
        return False
    return True


if __name__ == "__main__":
    main()
