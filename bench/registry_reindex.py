"""How long a registry takes to rebuild its index from the store.

Writes records of versions (100 adapters, one move of an alias for every tenth version) into a directory
store, and rebuilds the index of an embedded Valkey from them. The last line is JSON.

    python -m bench.registry_reindex --versions 10000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import SecretStr

from services.common.store import open_store
from services.common.valkey import EmbeddedValkey
from services.registry.config import RegistrySettings
from services.registry.journal import Journal
from services.registry.records import AliasMove, Card, FormatFacts, StoredFile, VersionRecord
from services.registry.service import Registry

ADAPTERS = 100
LIMIT_SECONDS = 20.0


def main() -> None:
    """Write the records, rebuild twice, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey.start(Path(folder) / "valkey") as valkey:
        url = f"file://{folder}/objects"
        store = open_store(url)
        store.ready()
        journal = Journal(store)
        for record in make_records(options.versions):
            journal.append(record)
        settings = RegistrySettings(redis_url=SecretStr(valkey.url), store_url=url)
        num_records, seconds = asyncio.run(rebuild(settings))
    result = {
        "benchmark": "registry_reindex",
        "versions": options.versions,
        "records": num_records,
        "seconds": [round(second, 3) for second in seconds],
        "limit_seconds": LIMIT_SECONDS,
        "holds": max(seconds) <= LIMIT_SECONDS,
    }
    print(json.dumps(result))


async def rebuild(settings: RegistrySettings) -> tuple[int, list[float]]:
    """Rebuild twice, the second time over a full index; return records and seconds."""
    registry = Registry(settings)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        num_records = await registry.reindex()
        seconds.append(time.perf_counter() - started)
    await registry.close()
    return num_records, seconds


def make_records(versions: int) -> Iterator[VersionRecord | AliasMove]:
    """Yield records as publishing them would write them."""
    digest = "sha256:" + "0" * 64
    targets = tuple(f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v"))
    files = (
        StoredFile("adapter_config.json", digest, 700),
        StoredFile("adapter_model.safetensors", digest, 14_000_000),
    )
    card = Card(method="lora", hyperparameters={f"parameter_{number}": str(number) for number in range(20)})
    for index in range(versions):
        number = index // ADAPTERS + 1
        adapter = f"adapter-{index % ADAPTERS}"
        yield VersionRecord(
            tenant="default",
            adapter=adapter,
            version=number,
            digest=f"sha256:{index:064x}",
            base_digest=digest,
            base_model="base",
            files=files,
            format=FormatFacts("lora", 16, targets, "F32", 3_500_000, 14_000_000, 224),
            card=card,
            warnings=(),
            create_time_ms=1_700_000_000_000 + index,
            idempotency_key=f"job-{index}",
            content_digest=digest,
            sequence=index + 1,
            epoch=1,
        )
        if index % 10 == 0:
            move = f"sha256:{index:064x}"
            yield AliasMove("default", adapter, "prod", number, number, move, 1_700_000_000_000 + index)


if __name__ == "__main__":
    main()
