"""The registry as a process: start, kill, restart, missing dependencies, and the reindex verb."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import redis
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafleet.registry.v1 import adapter_pb2, base_model_pb2
from services.common.adapter_format import read_folder
from services.common.channels import open_channel
from services.common.fingerprint import fingerprint_base, linear_module_table, num_parameters
from services.common.status import from_rpc_error
from services.common.valkey import EmbeddedValkey
from services.registry.index import STATE
from services.registry.service import SERVICES
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import FINGERPRINT, Client, Place, Upload, base_message, reason_of

WEIGHTS = "adapter_model.safetensors"


def environment(place: Place, folder: Path) -> dict[str, str]:
    return os.environ | {
        "LORAFLEET_REGISTRY_REDIS_URL": place.redis_url,
        "LORAFLEET_REGISTRY_STORE_URL": place.store_url,
        "LORAFLEET_PORT_FILE": str(folder / "port"),
    }


@asynccontextmanager
async def registry_process(place: Place, folder: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], str]]:
    """A registry process that listens; its health may still be NOT_SERVING."""
    port_file = folder / "port"
    port_file.unlink(missing_ok=True)
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - starting it takes no time
            [sys.executable, "-m", "services.registry"], env=environment(place, folder), stderr=log
        )
    try:
        while not port_file.exists():
            assert process.poll() is None, (folder / "log").read_text()
            await asyncio.sleep(0.05)
        yield process, port_file.read_text().strip()
    finally:
        process.kill()
        process.wait()


async def wait_for(channel: grpc.aio.Channel, wanted: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in SERVICES:
        while True:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = await stub.Check(request, timeout=5, wait_for_ready=True)
            if health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == wanted:
                break
            await asyncio.sleep(0.05)


@pytest.fixture
def place(redis_url: str, tmp_path: Path) -> Place:
    return Place.in_directory(redis_url, tmp_path / "objects")


async def test_kill_restart_and_reindex(place: Place, tmp_path: Path) -> None:
    upload = Upload.made(0)
    async with registry_process(place, tmp_path) as (process, address), open_channel(address) as channel:
        await wait_for(channel, "SERVING")
        client = Client(channel, "acme")
        request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
        await client.call(client.bases.CreateBaseModel, request)
        published = await client.publish(upload)
        await client.set_alias("prod", 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    async with registry_process(place, tmp_path) as (process, address), open_channel(address) as channel:
        await wait_for(channel, "SERVING")
        client = Client(channel, "acme")
        assert (await client.resolve("billing@prod")).digest == published.digest
        assert await client.download("billing", WEIGHTS) == upload.weights
        process.terminate()
        assert process.wait(20) == 0
    with redis.Redis.from_url(place.redis_url) as index:
        index.flushall()
        finished = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "services.registry", "reindex"],
            env=environment(place, tmp_path),
            capture_output=True,
            timeout=60,
        )
        assert (finished.returncode, finished.stdout) == (0, b"3 records indexed\n")
        assert index.hget(STATE, "records") == b"3"


async def test_starts_without_its_index_and_outlives_it(tmp_path: Path) -> None:
    with EmbeddedValkey.start(tmp_path / "valkey") as first:
        port = first.port
    place = Place.in_directory(f"redis://127.0.0.1:{port}/0", tmp_path / "objects")
    async with registry_process(place, tmp_path) as (_, address), open_channel(address) as channel:
        await wait_for(channel, "NOT_SERVING")
        client = Client(channel, "acme")
        assert await reason_of(client.resolve("billing")) == "store_unavailable"
        with EmbeddedValkey.start(tmp_path / "valkey", port=port):
            await wait_for(channel, "SERVING")
            request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
            await client.call(client.bases.CreateBaseModel, request)
            await client.publish(Upload.made(0))
        assert await reason_of(client.resolve("billing")) == "store_unavailable"
        await wait_for(channel, "NOT_SERVING")
        with EmbeddedValkey.start(tmp_path / "empty", port=port):
            await wait_for(channel, "SERVING")
            assert (await client.resolve("billing")).version == 1


def test_wrong_arguments_and_settings(place: Place, tmp_path: Path) -> None:
    good = environment(place, tmp_path)
    for arguments, changes, word in [
        (["reindx"], {}, "usage"),
        ([], {"LORAFLEET_REGISTRY_STORE_URL": "ftp://x"}, "STORE_URL"),
        ([], {"LORAFLEET_REGISTRY_STORE_URL": "s3://b?endpoint=http://h:1"}, "missing_store_credentials"),
        ([], {"LORAFLEET_REGISTRY_MAXRANK": "1"}, "MAXRANK"),
    ]:
        finished = subprocess.run(
            [sys.executable, "-m", "services.registry", *arguments],
            env=good | changes,
            capture_output=True,
            timeout=60,
            text=True,
        )
        assert finished.returncode != 0
        assert word in finished.stderr


def test_row_146_a_registry_that_cannot_start_ends_within_two_seconds(place: Place, tmp_path: Path) -> None:
    secret = "not-to-be-shown"
    bad = {
        "LORAFLEET_REGISTRY_LISTEN": secret,
        "LORAFLEET_REGISTRY_QUOTA_BYTES": secret,
        "LORAFLEET_REGISTRY_QUOTA": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-m", "services.registry"],
        env=environment(place, tmp_path) | bad,
        capture_output=True,
        timeout=60,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert finished.returncode == 2
    assert all(name in finished.stderr for name in bad)
    assert "valid integer" in finished.stderr
    assert secret not in finished.stderr
    # Its own time, since a machine that does other things makes it wait.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


async def test_a_peft_adapter_on_a_real_base(place: Place, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make_tiny_llama(tmp_path / "base", hidden_size=32, intermediate_size=48)
    fingerprint = fingerprint_base(model, FINGERPRINT.quantization)
    base = base_message("llama", fingerprint)
    base.num_parameters = num_parameters(model)
    del base.linear_modules[:]
    for name, (in_features, out_features) in linear_module_table(model).items():
        base.linear_modules.add(name=name, in_features=in_features, out_features=out_features)
    folder = make_peft_adapter(model, tmp_path / "adapter", r=4, targets=("q_proj", "down_proj"))
    upload = Upload((folder / "adapter_config.json").read_bytes(), (folder / WEIGHTS).read_bytes())
    wide = make_tiny_llama(tmp_path / "wide", hidden_size=64)
    other = make_peft_adapter(wide, tmp_path / "other", r=4)
    misfit = Upload((other / "adapter_config.json").read_bytes(), (other / WEIGHTS).read_bytes())
    async with registry_process(place, tmp_path) as (_, address), open_channel(address) as channel:
        await wait_for(channel, "SERVING")
        client = Client(channel, "acme")
        request = base_model_pb2.CreateBaseModelRequest(base_model=base)
        await client.call(client.bases.CreateBaseModel, request)
        published = await client.publish(upload, base_digest=fingerprint.digest)
        assert published.format.num_modules == 4
        assert published.format.kind == adapter_pb2.DELTA_KIND_LORA
        assert await reason_of(client.publish(misfit, base_digest=fingerprint.digest)) == "base_mismatch"
        out = tmp_path / "out"
        out.mkdir()
        for name in ("adapter_config.json", WEIGHTS):
            (out / name).write_bytes(await client.download("billing", name))
    assert read_folder(out) == read_folder(folder, base_modules=linear_module_table(model))


async def test_a_watch_does_not_hold_a_registry_that_is_told_to_end(place: Place, tmp_path: Path) -> None:
    async with registry_process(place, tmp_path) as (process, address), open_channel(address) as channel:
        await wait_for(channel, "SERVING")
        call = Client(channel, "acme").adapters.WatchAdapters(
            adapter_pb2.WatchAdaptersRequest(), metadata=(("lorafleet-tenant", "acme"),)
        )
        await call.initial_metadata()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert from_rpc_error(caught.value).reason == "draining"
        # Its grace is 20 s.
        assert await asyncio.to_thread(process.wait, 10) == 0
