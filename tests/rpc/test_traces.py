"""One trace from a caller through two servers, for unary calls and streams, and its way to a collector."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from services.common import telemetry
from services.common.call_context import call_scope
from services.common.errors import InvalidArgument
from tests.support.rpc import ONCE, STREAM, TENANT, echo_service, our_channel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tracing() -> InMemorySpanExporter:
    """Collect spans in memory; a process can have one tracer provider only."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(tracing: InMemorySpanExporter) -> InMemorySpanExporter:
    tracing.clear()
    return tracing


async def spans_of(exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """Wait until `count` spans have ended; the client's end just after its call."""
    for _ in range(200):
        if len(exporter.get_finished_spans()) >= count:
            break
        await asyncio.sleep(0.01)
    found = list(exporter.get_finished_spans())
    assert len(found) == count
    return found


async def inner_once(request: bytes, context: Any) -> bytes:
    return b"answer"


async def inner_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"a"
    yield b"b"


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_one_trace_spans_client_server_and_the_server_behind(
    kind: str, spans: InMemorySpanExporter
) -> None:
    async with our_channel(echo_service(once=inner_once, stream=inner_stream)) as inner:

        async def outer_once(request: bytes, context: Any) -> Any:
            return await inner.unary_unary(ONCE)(request)

        async def outer_stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
            async for message in inner.unary_stream(STREAM)(request):
                yield message

        async with our_channel(echo_service(once=outer_once, stream=outer_stream)) as outer:
            with telemetry.tracer().start_as_current_span("request"), call_scope(tenant="acme"):
                if kind == "unary":
                    assert await outer.unary_unary(ONCE)(b"") == b"answer"
                else:
                    assert [m async for m in outer.unary_stream(STREAM)(b"")] == [b"a", b"b"]
            found = await spans_of(spans, 5)
    by_id = {span.context.span_id: span for span in found}
    assert len({span.context.trace_id for span in found}) == 1
    leaf = next(s for s in found if s.kind is SpanKind.SERVER and s.context.span_id not in parents(found))
    chain = [leaf]
    while (parent := chain[-1].parent) is not None:
        chain.append(by_id[parent.span_id])
    kinds = [SpanKind.SERVER, SpanKind.CLIENT, SpanKind.SERVER, SpanKind.CLIENT, SpanKind.INTERNAL]
    assert [span.kind for span in chain] == kinds
    assert all(dict(s.attributes or {})["rpc.grpc.status_code"] == 0 for s in chain[:-1])


def parents(found: list[ReadableSpan]) -> set[int]:
    return {span.parent.span_id for span in found if span.parent is not None}


async def test_a_callers_mistake_is_an_error_of_the_client_span_only(spans: InMemorySpanExporter) -> None:
    async def refuse(request: bytes, context: Any) -> bytes:
        raise InvalidArgument("bad_name", "no")

    async with our_channel(echo_service(once=refuse)) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary(ONCE)(b"", metadata=TENANT)
        found = {span.kind: span for span in await spans_of(spans, 2)}
    assert found[SpanKind.CLIENT].status.status_code is StatusCode.ERROR
    assert found[SpanKind.SERVER].status.status_code is StatusCode.UNSET
    assert dict(found[SpanKind.SERVER].attributes or {})["error.type"] == "bad_name"


async def test_spans_reach_a_collector() -> None:
    received: asyncio.Queue[Any] = asyncio.Queue()

    async def export(request: Any, context: Any) -> Any:
        await received.put(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    method = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
        response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    collector.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    # In a process of its own, since a process can have one tracer provider only.
    program = (
        "from services.common.telemetry import Telemetry, tracer\n"
        f"telemetry = Telemetry('echo', 'http://127.0.0.1:{port}')\n"
        "tracer().start_span('work').end()\n"
        "telemetry.shutdown()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        program,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(30):
            _, complaints = await process.communicate()
            request = await received.get()
    finally:
        await collector.stop(None)
    assert process.returncode == 0, complaints
    (group,) = request.resource_spans
    names = {a.key: a.value.string_value for a in group.resource.attributes}
    assert names["service.name"] == "lorafleet-echo"
    assert [span.name for scope in group.scope_spans for span in scope.spans] == ["work"]
