"""A server process from its start to its end: health, reflection, readiness, SIGTERM, refusals."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from services.common.config import ServiceSettings
from services.common.errors import FailedPrecondition, Unavailable
from services.common.server import ServiceHost
from services.common.status import from_rpc_error
from tests.support.rpc import SERVICE, STREAM, TENANT, echo_service, foreign_channel, running_host

ROOT = Path(__file__).parents[2]
START_SECONDS = 30
EVERYWHERE = "0.0.0.0:0"

SERVER_PROGRAM = f"""
import asyncio, sys
from services.common.config import ServiceSettings, load
from services.common.server import serve
from tests.support.rpc import echo_service

async def stream(request, context):
    for number in range(int(request)):
        yield str(number).encode()
        await asyncio.sleep(0.02)

async def register(host):
    async def closed():
        sys.stdout.write("closed\\n")
    host.on_close(closed)
    host.server.add_generic_rpc_handlers((echo_service(stream=stream),))
    await host.ready()

sys.exit(asyncio.run(serve("echo", load(ServiceSettings), register, services=["{SERVICE}"])))
"""


@contextmanager
def server_process(tmp_path: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run the program above; yield it and the file that will hold its address."""
    port_file = tmp_path / "port"
    ours = {key: value for key, value in os.environ.items() if not key.startswith("LORAFLEET_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROGRAM],
        cwd=ROOT,
        env=ours | {"LORAFLEET_PORT_FILE": str(port_file), "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, port_file
    finally:
        process.kill()
        process.communicate()


async def address_of(process: subprocess.Popen[str], port_file: Path) -> str:
    return await asyncio.to_thread(wait_for_address, process, port_file)


def wait_for_address(process: subprocess.Popen[str], port_file: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not port_file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return port_file.read_text().strip()


async def ended(process: subprocess.Popen[str]) -> tuple[str, list[dict[str, Any]]]:
    """Wait for the process; return its output and its log lines."""
    output, log = await asyncio.to_thread(process.communicate, timeout=30)
    # gRPC's own C code writes plain text beside our lines.
    return output, [json.loads(line) for line in log.splitlines() if line.startswith("{")]


async def drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def health(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return int(answer.status)


SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_sigterm_lets_a_stream_finish_and_refuses_new_calls(tmp_path: Path) -> None:
    with server_process(tmp_path) as (process, port_file):
        address = await address_of(process, port_file)
        async with foreign_channel(address) as channel:
            call = channel.unary_stream(STREAM)(b"60", metadata=TENANT, timeout=30)
            answers = [await call.read() for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            async with foreign_channel(address) as late:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await late.unary_stream(STREAM)(b"1", metadata=TENANT, timeout=5).read()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            while (answer := await call.read()) is not grpc.aio.EOF:
                answers.append(answer)
            assert await call.code() is grpc.StatusCode.OK
        output, lines = await ended(process)
    assert answers == [str(number).encode() for number in range(60)]
    assert process.returncode == 0
    assert output == "closed\n"
    assert [line["message"] for line in lines if line["logger"] == "lorafleet.server"] == [
        "listening",
        "draining",
        "stopped",
    ]
    (access,) = [line for line in lines if line["logger"] == "lorafleet.access"]
    assert (access["code"], access["tenant"], access["service"]) == ("OK", "acme", "echo")
    assert access["request_id"].startswith("req-")


async def test_row_141_sigterm_under_load_truncates_no_stream(tmp_path: Path) -> None:
    num_streams, num_messages = 32, 50
    with server_process(tmp_path) as (process, port_file):
        address = await address_of(process, port_file)

        async def read_all(call: Any) -> list[bytes]:
            answers = [await call.read()]
            started.release()
            while (answer := await call.read()) is not grpc.aio.EOF:
                answers.append(answer)
            assert await call.code() is grpc.StatusCode.OK
            return answers

        started = asyncio.Semaphore(0)
        async with (
            foreign_channel(address, use_local_subchannel_pool=1) as one,
            foreign_channel(address, use_local_subchannel_pool=1) as other,
        ):
            streams = [
                asyncio.create_task(
                    read_all(
                        channel.unary_stream(STREAM)(str(num_messages).encode(), metadata=TENANT, timeout=60)
                    )
                )
                for channel in (one, other)
                for _ in range(num_streams // 2)
            ]
            for _ in streams:
                await started.acquire()
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            # A connection that is draining takes no new calls either.
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await one.unary_stream(STREAM)(b"1", metadata=TENANT, timeout=5).read()
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            ends = await asyncio.gather(*streams, return_exceptions=True)
        output, lines = await ended(process)
    whole = [str(number).encode() for number in range(num_messages)]
    assert [end for end in ends if end != whole] == []
    assert (process.returncode, output) == (0, "closed\n")
    codes = [line["code"] for line in lines if line["logger"] == "lorafleet.access"]
    assert codes == ["OK"] * num_streams


async def test_row_143_a_server_without_file_descriptors_recovers(tmp_path: Path) -> None:
    with server_process(tmp_path) as (process, port_file):
        address = await address_of(process, port_file)
        host, _, port = address.rpartition(":")
        async with foreign_channel(address) as channel:
            call = channel.unary_stream(STREAM)(b"100", metadata=TENANT, timeout=60)
            assert await call.read() == b"0"
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, 64))
            idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(100)]
            async with foreign_channel(address, use_local_subchannel_pool=1) as late:
                with pytest.raises(grpc.aio.AioRpcError) as shed:
                    await late.unary_stream(STREAM)(b"1", metadata=TENANT, timeout=1).read()
                assert shed.value.code() in {
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                }
            for connection in idle:
                connection.close()
            assert await call.read() == b"1"
            await drain(call)
            assert await call.code() is grpc.StatusCode.OK
        async with foreign_channel(address, use_local_subchannel_pool=1) as channel:
            answers = channel.unary_stream(STREAM)(b"1", metadata=TENANT, timeout=20, wait_for_ready=True)
            assert [answer async for answer in answers] == [b"0"]


async def test_after_the_grace_a_stream_is_ended(tmp_path: Path) -> None:
    with server_process(tmp_path, LORAFLEET_GRACE_SECONDS="0.3") as (process, port_file):
        address = await address_of(process, port_file)
        async with foreign_channel(address) as channel:
            call = channel.unary_stream(STREAM)(b"100000", metadata=TENANT, timeout=30)
            assert await call.read() == b"0"
            process.send_signal(signal.SIGINT)
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await drain(call)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        output, _ = await ended(process)
    assert (process.returncode, output) == (0, "closed\n")


async def test_row_146_bad_settings_end_with_code_2_and_name_every_variable(tmp_path: Path) -> None:
    bad = {"LORAFLEET_GRACE_SECONDS": "nan", "LORAFLEET_LISTEN": "here", "LORAFLEET_LISTN": "x"}
    with server_process(tmp_path, **bad) as (process, _):
        _, message = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == 2
    assert all(name in message for name in bad)


async def test_row_119_a_server_that_trusts_its_callers_is_not_opened_to_others(tmp_path: Path) -> None:
    with server_process(tmp_path, LORAFLEET_LISTEN=EVERYWHERE) as (process, _):
        _, lines = await ended(process)
        assert process.returncode == 1
    assert "LORAFLEET_INSECURE_BIND" in lines[-1]["detail"]
    with pytest.raises(FailedPrecondition, match="insecure_bind"):
        ServiceHost(ServiceSettings(listen="192.0.2.1:0"), [SERVICE])
    with server_process(tmp_path, LORAFLEET_LISTEN=EVERYWHERE, LORAFLEET_INSECURE_BIND="true") as (
        process,
        port_file,
    ):
        address = await address_of(process, port_file)
        assert await health("127.0.0.1:" + address.removeprefix("0.0.0.0:")) == SERVING


async def test_row_146_a_taken_port_is_reported(tmp_path: Path) -> None:
    async with running_host(echo_service()) as (_, address):
        with server_process(tmp_path, LORAFLEET_LISTEN=address) as (process, _):
            _, lines = await ended(process)
    assert process.returncode == 1
    assert lines[-1]["message"] == "cannot start"
    assert address in lines[-1]["detail"]


async def test_the_server_becomes_ready_when_its_dependency_comes_and_watch_tells() -> None:
    present = False

    async def probe() -> None:
        if not present:
            raise Unavailable("store_unavailable", "no index")

    async with running_host(echo_service()) as (host, address):
        assert await health(address) == await health(address, SERVICE) == SERVING
        host.ready_when(probe, interval_seconds=0.05)
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
            assert (await watch.read()).status == NOT_SERVING
            present = True
            assert (await watch.read()).status == SERVING
            assert await health(address) == SERVING
            present = False
            assert (await watch.read()).status == NOT_SERVING
            assert await health(address) == NOT_SERVING
            watch.cancel()


async def test_a_service_is_not_serving_until_declared_ready() -> None:
    host = ServiceHost(ServiceSettings(), [SERVICE])
    address = str(await host.start())
    try:
        assert await health(address) == await health(address, SERVICE) == NOT_SERVING
        await host.ready(SERVICE)
        assert await health(address) == await health(address, SERVICE) == SERVING
        await host.not_ready()
        assert await health(address, SERVICE) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health(address, "no.such.Service")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    finally:
        await host.stop(grace_seconds=0)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services(version: str) -> None:
    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health")

    async with running_host(echo_service()) as (_, address), foreign_channel(address) as channel:
        method = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, described = [answer async for answer in method(requests(), timeout=10)]
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


async def test_a_health_watch_hears_of_the_end_and_does_not_delay_it() -> None:
    host = ServiceHost(ServiceSettings(), [SERVICE])
    await host.ready()
    address = str(await host.start())
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
        assert (await watch.read()).status == SERVING
        started = time.monotonic()
        await host.stop(grace_seconds=30)
        assert time.monotonic() - started < 5
        assert (await watch.read()).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as ended_watch:
            await watch.read()
    assert from_rpc_error(ended_watch.value).reason == "draining"


async def test_hooks_run_in_order_and_one_that_fails_stops_no_other() -> None:
    order: list[str] = []
    host = ServiceHost(ServiceSettings(), [SERVICE])

    async def drain() -> None:
        order.append("drain")
        raise ValueError("broken hook")

    async def first() -> None:
        order.append("first")

    async def second() -> None:
        order.append("second")
        raise ValueError("broken hook")

    host.on_drain(drain)
    host.on_close(first)
    host.on_close(second)
    await host.start()
    await host.stop(grace_seconds=0)
    assert order == ["drain", "second", "first"]
