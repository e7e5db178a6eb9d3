"""What the registry adds to moving the bytes of an adapter, and the memory that it moves them in.

Beside publish and download, in the same run and in turns, the plain way: copying the files into a folder with
fsync, or the bare MinIO client against the same server. Ratios are the registry's time over the plain one.
Memory is the registry's peak while it publishes or serves so many at once, above what it held after the first
one. The last line is JSON.

    python -m bench.registry_throughput
    python -m bench.registry_throughput --layers 270 --concurrency 1 16 --rounds 1
    python -m bench.registry_throughput --access-key K --secret-key S \\
        --store s3://BUCKET?endpoint=http://HOST:PORT
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np
from minio import Minio

from lorafleet.registry.v1 import adapter_pb2, base_model_pb2
from services.common.call_context import call_scope
from services.common.transport import CHUNK_BYTES
from services.common.valkey import EmbeddedValkey
from tests.support.adapter_files import config_bytes, from_array, safetensors_bytes
from tests.support.forked_registry import forget_peak, forked_registry, peak_bytes, resident_bytes
from tests.support.registry import FINGERPRINT, Client, Place, Upload, base_message

RANK = 16
FEATURES = 4096
LAYERS_OF_14_MB = 27
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

Way = Callable[[int], Awaitable[None]]


def main() -> None:
    """Measure every way in turn, and print medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=LAYERS_OF_14_MB, help="0.5 MB each")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", default="", help="store URL; a folder when left out")
    parser.add_argument("--access-key", default="")
    parser.add_argument("--secret-key", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey.start(Path(folder) / "valkey") as valkey:
        url = options.store or f"file://{folder}/objects"
        place = Place(valkey.url, url, options.access_key or None, options.secret_key or None)
        plain: Plain = PlainS3(options) if options.store else PlainFolder(Path(folder))
        result = asyncio.run(measure(place, plain, options))
    print(json.dumps({"benchmark": "registry_throughput", "store": plain.name} | result))


class Plain(Protocol):
    """Moves the two files without a registry."""

    name: str

    def put(self, number: int, upload: Upload) -> None:
        """Store the files as copy `number`."""

    def get(self, number: int) -> int:
        """Read copy `number` and return its bytes."""


class PlainFolder:
    """A file copy, synced to disk."""

    name = "directory"

    def __init__(self, folder: Path) -> None:
        self._source = folder / "source"
        self._target = folder / "plain"
        self._target.mkdir()

    def put(self, number: int, upload: Upload) -> None:
        source = self._source / str(number)
        if not source.exists():
            source.mkdir(parents=True)
            for name, data in upload.files():
                (source / name).write_bytes(data)
        for name, _ in upload.files():
            target = self._target / f"{number}-{name}"
            shutil.copyfile(source / name, target)
            with target.open("rb") as file:
                os.fsync(file.fileno())

    def get(self, number: int) -> int:
        read = self._target / f"read-{number}"
        shutil.copyfile(self._target / f"{number}-{WEIGHTS}", read)
        return read.stat().st_size


class PlainS3:
    """The MinIO client with its own settings."""

    name = "s3"

    def __init__(self, options: argparse.Namespace) -> None:
        parts = urlsplit(options.store)
        endpoint = urlsplit(parse_qs(parts.query)["endpoint"][0])
        self._bucket = parts.netloc
        self._client = Minio(
            endpoint.netloc,
            options.access_key,
            options.secret_key,
            secure=endpoint.scheme == "https",
            region="us-east-1",
        )
        self._folder = Path(tempfile.mkdtemp())

    def put(self, number: int, upload: Upload) -> None:
        for name, data in upload.files():
            path = self._folder / f"{number}-{name}"
            if not path.exists():
                path.write_bytes(data)
            self._client.fput_object(self._bucket, f"plain/{number}-{name}", str(path))

    def get(self, number: int) -> int:
        path = self._folder / f"read-{number}"
        self._client.fget_object(self._bucket, f"plain/{number}-{WEIGHTS}", str(path))
        return path.stat().st_size


async def measure(place: Place, plain: Plain, options: argparse.Namespace) -> dict[str, object]:
    """Run all ways at each concurrency."""
    upload = make_upload(options.layers)
    size_bytes = sum(len(data) for _, data in upload.files())
    result: dict[str, object] = {"adapter_bytes": size_bytes}
    async with forked_registry(place) as (process, client):
        request = base_model_pb2.CreateBaseModelRequest(base_model=wide_base(options.layers))
        await client.call(client.bases.CreateBaseModel, request)
        await publish(client, upload, 0)
        await download(client, len(upload.weights))
        await asyncio.to_thread(plain.put, 0, upload)
        settled_bytes = resident_bytes(process)
        for concurrency in options.concurrency:
            ways: dict[str, Way] = {
                "publish": lambda number: publish(client, upload, number),
                "plain_put": lambda number: asyncio.to_thread(plain.put, number, upload),
                "download": lambda number: download(client, len(upload.weights)),
                "plain_get": lambda number: read(plain, number, len(upload.weights)),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            peaks_bytes = dict.fromkeys(ways, 0)
            for _ in range(options.rounds):
                for name, way in ways.items():
                    forget_peak(process)
                    started = time.perf_counter()
                    await asyncio.gather(*(way(number) for number in range(concurrency)))
                    seconds[name].append(time.perf_counter() - started)
                    peaks_bytes[name] = max(peaks_bytes[name], peak_bytes(process) - settled_bytes)
            median = {name: statistics.median(times) for name, times in seconds.items()}
            result[f"concurrency_{concurrency}"] = {
                "megabytes_per_second": {
                    name: round(concurrency * size_bytes / median[name] / 1e6, 1) for name in ways
                },
                "publish_ratio": round(median["publish"] / median["plain_put"], 2),
                "download_ratio": round(median["download"] / median["plain_get"], 2),
                "peak_growth_megabytes": {
                    name: round(peaks_bytes[name] / 1e6, 1) for name in ("publish", "download")
                },
            }
        result["settled_megabytes"] = round(settled_bytes / 1e6, 1)
    return result


def make_upload(num_layers: int) -> Upload:
    """An adapter of so many layers."""
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(num_layers):
        for name, shape in (("lora_A", (RANK, FEATURES)), ("lora_B", (FEATURES, RANK))):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}.weight"
            tensors[key] = from_array("F32", (rng.standard_normal(shape) * 0.01).astype("<f4"))
    return Upload(config_bytes(r=RANK, target_modules=["q_proj"]), safetensors_bytes(tensors))


def wide_base(num_layers: int) -> base_model_pb2.BaseModel:
    """The base that `make_upload` fits."""
    base = base_message()
    del base.linear_modules[:]
    for layer in range(num_layers):
        name = f"model.layers.{layer}.self_attn.q_proj"
        base.linear_modules.add(name=name, in_features=FEATURES, out_features=FEATURES)
    return base


async def publish(client: Client, upload: Upload, number: int) -> None:
    """Publish in chunks of a usual size."""
    header = upload.header(f"adapter-{number}", base_digest=FINGERPRINT.digest)

    def requests() -> Iterator[adapter_pb2.PublishVersionRequest]:
        yield adapter_pb2.PublishVersionRequest(header=header)
        for name, data in upload.files():
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = adapter_pb2.FileChunk(file=name, data=data[start : start + CHUNK_BYTES])
                yield adapter_pb2.PublishVersionRequest(chunk=chunk)

    await client.call(client.adapters.PublishVersion, requests())


async def download(client: Client, size_bytes: int) -> None:
    """Download the weights of the first adapter, and throw them away."""
    request = adapter_pb2.DownloadVersionRequest(ref="adapter-0", file=WEIGHTS)
    received = 0
    with call_scope(tenant=client.tenant):
        async for response in client.adapters.DownloadVersion(request, timeout=120):
            received += len(response.data)
    assert received == size_bytes


async def read(plain: Plain, number: int, size_bytes: int) -> None:
    assert await asyncio.to_thread(plain.get, number) == size_bytes


if __name__ == "__main__":
    main()
