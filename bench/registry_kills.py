"""What a registry that is killed again and again loses: nothing that it acknowledged.

Publishers, alias moves, deletions, files, resumable uploads and garbage collection run against one registry
over a directory store, or any S3. Each round kills it (SIGKILL) at a random failpoint, starts it again, and
compares what it serves with what it had acknowledged. The last line is JSON.

    python -m bench.registry_kills --kills 300 --seed 1
    python -m bench.registry_kills --store s3://BUCKET?endpoint=http://HOST:PORT --access-key K --secret-key S
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import tempfile
import time
from pathlib import Path

from services.common.errors import LorafleetError
from services.common.valkey import EmbeddedValkey
from tests.support.crash_ledger import Ledger
from tests.support.forked_registry import forked_registry
from tests.support.registry import Place

STEPS = ("before_record", "after_record", "after_index")
FAILPOINTS = (
    *(f"{what}.{step}" for what in ("publish", "alias", "delete", "file", "file_delete") for step in STEPS),
    *("blob.before_put", "blob.after_put", "store.before_visible", "store.before_sync"),
    *("upload.after_session", "upload.before_part", "upload.after_part"),
    *("upload.before_complete", "upload.before_cleanup", "gc.before_delete", "gc.after_delete"),
)
MAX_OPERATIONS = 60
COLLECT_SECONDS = 0.02


@dataclasses.dataclass
class Counts:
    """What was seen over all rounds."""

    kills: int = 0
    kills_at_failpoints: int = 0
    acknowledged: int = 0
    lost: int = 0
    half_visible: int = 0
    restart_seconds_worst: float = 0.0


def main() -> None:
    """Run the rounds and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", default="", help="store URL; a folder when left out")
    parser.add_argument("--access-key")
    parser.add_argument("--secret-key")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    rules = [f"{draw.choice(FAILPOINTS)}=kill:{draw.randint(1, 3)}" for _ in range(options.kills)]
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey.start(Path(folder) / "valkey") as valkey:
        url = options.store or f"file://{folder}/objects"
        counts = run(Place(valkey.url, url, options.access_key, options.secret_key), rules, options.seed)
    kind = "s3" if options.store.startswith("s3:") else "directory"
    about = {"benchmark": "registry_kills", "store": kind, "seed": options.seed}
    print(json.dumps(about | dataclasses.asdict(counts)))


def run(place: Place, rules: list[str], seed: int) -> Counts:
    """Kill a registry at `place` once by each rule; return what was seen."""
    return asyncio.run(_rounds(place, rules, seed))


async def _rounds(place: Place, rules: list[str], seed: int) -> Counts:
    counts = Counts()
    ledger = Ledger(random.Random(seed))
    for rule in rules:
        started = time.monotonic()
        async with forked_registry(place, rule=rule, collect_seconds=COLLECT_SECONDS) as (process, client):
            counts.restart_seconds_worst = max(counts.restart_seconds_worst, time.monotonic() - started)
            try:
                await ledger.audit(client, sample=3)
                for _ in range(MAX_OPERATIONS):
                    await ledger.operate(client, rule.partition(".")[0])
            except LorafleetError as error:
                # Its process is gone; everything else is a finding.
                await asyncio.to_thread(process.join, 10)
                if process.is_alive():
                    raise AssertionError(f"{rule}: {error}") from error
            counts.kills += 1
            counts.kills_at_failpoints += not process.is_alive()
    async with forked_registry(place) as (_, client):
        await ledger.audit(client, sample=None)
    counts.acknowledged = ledger.num_acknowledged
    counts.lost, counts.half_visible = len(ledger.lost), len(ledger.half_visible)
    for finding in (*ledger.lost, *ledger.half_visible):
        print(finding)
    return counts


if __name__ == "__main__":
    main()
