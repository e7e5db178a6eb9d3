"""What servers measure, in memory, on the Prometheus port and at a collector; and the table of names."""

from __future__ import annotations

import ast
import asyncio
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from services.common import metrics
from services.common.config import ServiceSettings
from services.common.errors import FailedPrecondition, NotFound
from services.common.metrics import METRICS, Kind
from services.common.server import start_telemetry
from tests.support.metric_reader import start_reading, total
from tests.support.rpc import ONCE, SERVICE, STREAM, TENANT, echo_service, plain_channel

ROOT = Path(__file__).parents[2]
DURATION = "rpc.server.call.duration"
IN_FLIGHT = "lorafleet.rpc.server.calls_in_flight"
WITHOUT_DEADLINE = "lorafleet.rpc.server.calls_without_deadline"


@pytest.fixture(autouse=True)
def reading() -> None:
    start_reading()


async def settled(name: str, attributes: Mapping[str, object], wanted: float) -> float:
    """Wait until a total is what it should be; the server ends a call after its client has."""
    for _ in range(200):
        if total(name, attributes) == wanted:
            break
        await asyncio.sleep(0.01)
    return total(name, attributes)


async def test_calls_are_measured_by_method_code_and_reason() -> None:
    async def maybe(request: bytes, context: Any) -> bytes:
        if request == b"fail":
            raise NotFound("adapter_not_found", "no")
        return b""

    once = {"rpc.method": f"{SERVICE}/Once"}
    fine = once | {"rpc.response.status_code": "OK"}
    missing = once | {"rpc.response.status_code": "NOT_FOUND", "error.type": "adapter_not_found"}
    before = total(DURATION, fine), total(DURATION, missing)
    async with plain_channel(echo_service(once=maybe)) as channel:
        for _ in range(3):
            await channel.unary_unary(ONCE)(b"", metadata=TENANT)
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(ONCE)(b"fail", metadata=TENANT)
        assert await settled(DURATION, fine, before[0] + 3) == before[0] + 3
        assert await settled(DURATION, missing, before[1] + 1) == before[1] + 1


async def test_calls_in_flight_go_up_and_down() -> None:
    async def two(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(30)

    stream: dict[str, object] = {"rpc.method": f"{SERVICE}/Stream"}
    before = total(IN_FLIGHT, stream)
    async with plain_channel(echo_service(stream=two)) as channel:
        calls = [channel.unary_stream(STREAM)(b"", metadata=TENANT) for _ in range(3)]
        for call in calls:
            assert await call.read() == b"a"
        assert total(IN_FLIGHT, stream) == before + 3
        for call in calls:
            call.cancel()
        assert await settled(IN_FLIGHT, stream, before) == before


async def test_row_109_a_call_without_a_deadline_is_counted_and_ended_at_the_servers_maximum() -> None:
    async def sleep(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0 if request == b"quick" else 30)
        return b""

    once: dict[str, object] = {"rpc.method": f"{SERVICE}/Once"}
    before = total(WITHOUT_DEADLINE, once)
    settings = ServiceSettings(unary_timeout_seconds=0.2)
    async with plain_channel(echo_service(once=sleep), settings) as channel:
        await channel.unary_unary(ONCE)(b"quick", metadata=TENANT, timeout=5)
        assert total(WITHOUT_DEADLINE, once) == before
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await channel.unary_unary(ONCE)(b"", metadata=TENANT)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert total(WITHOUT_DEADLINE, once) == before + 1


PROGRAM = """
import asyncio, sys
from services.common.config import ServiceSettings, load
from services.common.server import serve
from tests.support.rpc import echo_service

async def once(request, context):
    return b"here"

async def register(host):
    host.server.add_generic_rpc_handlers((echo_service(once=once),))
    await host.ready()

settings, services = load(ServiceSettings), ["lorafleet.test.v1.EchoService"]
sys.exit(asyncio.run(serve("echo", settings, register, services=services)))
"""


async def served(folder: Path, **environment: str) -> None:
    """Run a server process, make one call, and stop it by SIGTERM."""
    port_file = folder / "port"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LORAFLEET_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        cwd=ROOT,
        env=inherited | {"LORAFLEET_PORT_FILE": str(port_file), "PYTHONPATH": str(ROOT)} | environment,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            while not port_file.exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
            async with grpc.aio.insecure_channel(port_file.read_text().strip()) as channel:
                once: Any = channel.unary_unary(ONCE)
                assert await once(b"", metadata=TENANT, timeout=10) == b"here"
            if "LORAFLEET_METRICS_LISTEN" in environment:
                page = await asyncio.to_thread(scrape, environment["LORAFLEET_METRICS_LISTEN"])
                check_page(page)
            process.terminate()
            _, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, log


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def check_page(page: str) -> None:
    samples = [line for line in page.splitlines() if not line.startswith("#")]
    (count,) = [s for s in samples if s.startswith("rpc_server_call_duration_seconds_count")]
    assert f'rpc_method="{SERVICE}/Once"' in count
    assert 'rpc_response_status_code="OK"' in count
    assert count.endswith(" 1.0")
    (info,) = [s for s in samples if s.startswith("lorafleet_server_info")]
    assert 'security="plaintext"' in info
    assert 'insecure_bind="false"' in info
    assert 'service_name="lorafleet-echo"' in page


async def test_the_prometheus_port_shows_them(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    await served(tmp_path, LORAFLEET_METRICS_LISTEN=f"127.0.0.1:{port}")


async def test_they_reach_a_collector(tmp_path: Path) -> None:
    received: asyncio.Queue[Any] = asyncio.Queue()

    async def take_metrics(request: Any, context: Any) -> Any:
        await received.put(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()

    async def take_traces(request: Any, context: Any) -> Any:
        return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    for kind, take, request, response in (
        (
            "metrics.v1.MetricsService",
            take_metrics,
            metrics_service_pb2.ExportMetricsServiceRequest,
            metrics_service_pb2.ExportMetricsServiceResponse,
        ),
        (
            "trace.v1.TraceService",
            take_traces,
            trace_service_pb2.ExportTraceServiceRequest,
            trace_service_pb2.ExportTraceServiceResponse,
        ),
    ):
        method = grpc.unary_unary_rpc_method_handler(
            take, request_deserializer=request.FromString, response_serializer=response.SerializeToString
        )
        name = f"opentelemetry.proto.collector.{kind}"
        collector.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    try:
        await served(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}")
        async with asyncio.timeout(30):
            request = await received.get()
    finally:
        await collector.stop(None)
    found = {m.name for r in request.resource_metrics for s in r.scope_metrics for m in s.metrics}
    assert {DURATION, IN_FLIGHT} <= found


async def test_metrics_are_not_opened_to_other_machines() -> None:
    with pytest.raises(FailedPrecondition, match="insecure_bind") as refused:
        start_telemetry("echo", ServiceSettings(metrics_listen="0.0.0.0:0"))
    assert refused.value.field == "metrics_listen"


def used_names() -> Iterator[tuple[str, str]]:
    """Yield the kind and the name of every instrument that the services ask for."""
    makers = {kind.value for kind in Kind}
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                is_ours = isinstance(node.func.value, ast.Name) and node.func.value.id == "metrics"
                if is_ours and node.func.attr in makers:
                    (name,) = node.args
                    assert isinstance(name, ast.Constant), f"{path}: the name stands in the source"
                    yield node.func.attr, str(name.value)
                assert (
                    not node.func.attr.startswith("create_")
                    or "metrics.py" in path.name
                    or (node.func.attr.removeprefix("create_") not in makers)
                ), f"{path} makes an instrument past the table"


def test_every_metric_that_is_used_is_declared_and_the_other_way_round() -> None:
    used = set(used_names())
    assert ("histogram", DURATION) in used
    assert used == {(row.kind.value, name) for name, row in METRICS.items()}


def test_a_metric_that_is_not_declared_cannot_be_made() -> None:
    with pytest.raises(KeyError):
        metrics.counter("lorafleet.made_up")


@pytest.mark.parametrize("name", METRICS)
def test_a_row_says_what_it_needs_to(name: str) -> None:
    row = METRICS[name]
    assert row.unit
    assert row.description.endswith(".")
    assert (row.kind is Kind.HISTOGRAM) == bool(row.boundaries)
    assert list(row.boundaries) == sorted(set(row.boundaries))
