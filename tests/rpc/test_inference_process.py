"""The inference process: `python -m services.inference` from its start to SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.errors import LorafleetError
from tests.support.inference import (
    Answer,
    InferenceClient,
    request,
    running_registry,
    take,
    until_health,
    until_served,
)
from tests.support.models import make_tiny_llama
from tests.support.registry import Place

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
END_SECONDS = 30
PROGRAM = ("-m", "services.inference")
# The service on a device that fails with the first request, and then does not answer any more.
ON_A_DEVICE_THAT_IS_LOST = """
import runpy
from services.inference.engine.runner import DeviceLost, Runner

run = Runner.run

def fail(self, batch):
    if batch.chunks:
        raise RuntimeError("an illegal access was encountered")
    return run(self, batch)

def recover(self):
    raise DeviceLost("it does not answer")

Runner.run, Runner.recover = fail, recover
runpy.run_module("services.inference", run_name="__main__")
"""


@contextmanager
def inference_process(
    folder: Path, registry: str, *, program: tuple[str, ...] = PROGRAM, **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """Run the process; its address will be in `folder / "port"`."""
    values = {
        "LISTEN": "127.0.0.1:0",
        "BASE_NAME": "tiny",
        "BASE_PATH": str(folder / "base"),
        "ADAPTER_CACHE_PATH": str(folder / "cache"),
        "REGISTRY_TARGET": registry,
        "QUANTIZATION": "nf4",
        "COMPUTE_DTYPE": "float32",
        "DEVICE": "cpu",
        "CPU_THREADS": "1",
        "KV_BYTES": str(8 << 20),
        **settings,
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAFLEET_")}
    environment |= {f"LORAFLEET_INFERENCE_{name}": value for name, value in values.items()}
    process = subprocess.Popen(
        [sys.executable, *program],
        cwd=ROOT,
        env=environment | {"LORAFLEET_PORT_FILE": str(folder / "port")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def address_of(process: subprocess.Popen[str], folder: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "port").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the process does not listen"
        await asyncio.sleep(0.05)
    return (folder / "port").read_text("ascii").strip()


async def test_sigterm_lets_a_stream_end_and_refuses_new_ones(tmp_path: Path, redis_url: str) -> None:
    make_tiny_llama(tmp_path / "base", seed=1)
    place = Place.in_directory(redis_url, tmp_path / "store")
    async with running_registry(place) as (registry, _):
        with inference_process(tmp_path, registry) as process:
            address = await address_of(process, tmp_path)
            await until_health(address, "SERVING")
            async with open_channel(address) as channel:
                client = InferenceClient(InferenceServiceStub(channel))
                await until_served(client)
                started: list[messages.Started] = []
                answers: dict[int, Answer] = {}
                with call_scope(tenant=client.tenant):
                    stream = client.stub.Generate(request("Once", max_tokens=400, ignore_eos=True))
                    async for response in stream:
                        if not started:
                            process.send_signal(signal.SIGTERM)
                        take(response, started, answers)
                assert len(answers[0].token_ids) == 400
                assert answers[0].finished is not None
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await client.stub.GetStatus(calls.GetStatusRequest(), timeout=5)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            _, stderr = await asyncio.to_thread(process.communicate, timeout=END_SECONDS)
    assert process.returncode == 0, stderr
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    assert lines[-1]["message"] == "stopped"


async def test_base_that_cannot_be_loaded_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with inference_process(tmp_path, "127.0.0.1:1") as process:
        _, stderr = await asyncio.to_thread(process.communicate, timeout=START_SECONDS)
    assert process.returncode == 1
    assert "missing_file" in stderr


async def test_107_a_lost_device_ends_the_process(tmp_path: Path, redis_url: str) -> None:
    make_tiny_llama(tmp_path / "base", seed=1)
    place = Place.in_directory(redis_url, tmp_path / "store")
    async with running_registry(place) as (registry, _):
        with inference_process(tmp_path, registry, program=("-c", ON_A_DEVICE_THAT_IS_LOST)) as process:
            address = await address_of(process, tmp_path)
            await until_health(address, "SERVING")
            async with open_channel(address) as channel:
                client = InferenceClient(InferenceServiceStub(channel))
                await until_served(client)
                with pytest.raises(LorafleetError) as caught:
                    await client.generate(request("Once"))
                assert caught.value.reason == "device_lost"
            _, stderr = await asyncio.to_thread(process.communicate, timeout=END_SECONDS)
    assert process.returncode == 1
    assert "engine_failed" in stderr
