"""What the Prometheus port of the inference process says after some work."""

from __future__ import annotations

import asyncio
import re
import socket
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from bench.many_adapters import until_serving
from bench.service_process import service_process
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.channels import open_channel
from tests.support.inference import TENANT, InferenceClient, publish, request, until_served
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import Client

SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def page_of(port: int) -> dict[tuple[str, str], float]:
    """Return every sample by its name and its labels, the histograms' buckets left out."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        match = SAMPLE.fullmatch(line)
        if match is not None and not match[1].endswith("_bucket"):
            labels = ",".join(
                part for part in (match[2] or "").split(",") if part and not part.startswith("otel_scope")
            )
            found[match[1], labels] = float(match[3])
    return found


async def test_the_prometheus_port_tells_of_queue_cache_times_and_adapters(
    tmp_path: Path, redis_url: str
) -> None:
    base = make_tiny_llama(tmp_path / "base", seed=1)
    adapter = make_peft_adapter(base, tmp_path / "one", r=4)
    port = free_port()
    with ExitStack() as stack:
        store = {"REDIS_URL": redis_url, "STORE_URL": f"file://{tmp_path}/store"}
        registry_target = stack.enter_context(service_process("registry", tmp_path, store))
        settings = {
            "BASE_PATH": base,
            "BASE_NAME": "tiny",
            "QUANTIZATION": "none",
            "COMPUTE_DTYPE": "float32",
            "DEVICE": "cpu",
            "CPU_THREADS": 1,
            "REGISTRY_TARGET": registry_target,
            "ADAPTER_CACHE_PATH": tmp_path / "cache",
            "KV_BYTES": 8 << 20,
            "BLOCK_SIZE": 4,
            "METRICS_LISTEN": f"127.0.0.1:{port}",
        }
        target = stack.enter_context(service_process("inference", tmp_path, settings))
        async with open_channel(target) as channel, open_channel(registry_target) as registry_channel:
            await asyncio.wait_for(until_serving(channel), 60)
            client = InferenceClient(InferenceServiceStub(channel), TENANT)
            digest = await until_served(client)
            await publish(Client(registry_channel, TENANT), "one", adapter, digest)
            for _ in range(3):
                await client.generate(request("The same prompt", "one", max_tokens=10, ignore_eos=True))
            running = asyncio.create_task(
                client.generate(request("Once", max_tokens=480, ignore_eos=True, n=4))
            )
            await client.until(lambda status: status.running == 4)
            during: dict[tuple[str, str], float] = {}
            while not running.done() and not during.get(("lorafleet_inference_sequences_running", "")):
                during = await asyncio.to_thread(page_of, port)
                await asyncio.sleep(0.05)
            await running
            await asyncio.sleep(1.5)
            after = await asyncio.to_thread(page_of, port)
    assert during["lorafleet_inference_sequences_running", ""] == 4
    assert during["lorafleet_inference_kv_used_bytes", ""] > 0
    assert after["lorafleet_inference_sequences_running", ""] == 0
    assert after["lorafleet_inference_kv_used_bytes", ""] == 0
    assert after["lorafleet_inference_kv_total_bytes", ""] >= 0
    assert after["lorafleet_inference_tokens_total", 'kind="completion"'] == 3 * 10 + 4 * 480
    assert after["lorafleet_inference_prefix_cache_tokens_total", 'result="hit"'] >= 2 * 12
    assert after["lorafleet_inference_time_to_first_token_seconds_count", ""] == 4
    assert after["lorafleet_inference_queue_duration_seconds_count", ""] == 4
    assert after["lorafleet_inference_inter_token_duration_seconds_count", ""] >= 3 * 9
    stages = {labels for name, labels in after if "load_stage_duration_seconds_count" in name}
    assert {'stage="download"', 'stage="parse"'} <= stages
    loads = [value for (name, _), value in after.items() if name == "lorafleet_inference_adapter_loads_total"]
    assert loads == [1]
    asked = {
        labels: value for (name, labels), value in after.items() if name.endswith("adapter_requests_total")
    }
    assert sum(asked.values()) == 3
    assert all("adapter=" in labels for labels in asked)
