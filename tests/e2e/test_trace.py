"""One trace of a real fleet, as a collector receives it: from the HTTP request to the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from tests.support.models import make_tiny_llama

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN = "b7ad6b7169203331"
_PACKAGE = "opentelemetry.proto.collector"


class Collector:
    """An OTLP collector that keeps the spans of one trace, by service."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
        for kind, messages, export in (
            ("trace", trace_service_pb2, self._traces),
            ("metrics", metrics_service_pb2, self._metrics),
        ):
            name = kind.capitalize()
            method = grpc.unary_unary_rpc_method_handler(
                export,
                request_deserializer=getattr(messages, f"Export{name}ServiceRequest").FromString,
                response_serializer=getattr(messages, f"Export{name}ServiceResponse").SerializeToString,
            )
            service = f"{_PACKAGE}.{kind}.v1.{name}Service"
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, {"Export": method}),)
            )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def _traces(self, request: Any, context: Any) -> Any:
        for group in request.resource_spans:
            names = {one.key: one.value.string_value for one in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    if span.trace_id.hex() == TRACE_ID:
                        self.spans.append((names["service.name"], span))
        return trace_service_pb2.ExportTraceServiceResponse()

    def _metrics(self, request: Any, context: Any) -> Any:
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.stop()


def lorafleet(*arguments: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run the command line with --json and return what it printed."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def test_a_request_is_one_trace_from_http_to_the_first_token(tmp_path: Path, collector: Collector) -> None:
    base = make_tiny_llama(tmp_path / "base")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
    state = ("--state", str(tmp_path / "state"))
    started = lorafleet("up", *state, "--base", str(base), "--base-name", "tiny", environment=environment)
    try:
        answer = httpx.post(
            f"{started['base_url']}/completions",
            json={"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0},
            headers={
                "authorization": f"Bearer {started['api_key']}",
                "traceparent": f"00-{TRACE_ID}-{CALLER_SPAN}-01",
            },
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
    finally:
        # Every process sends what it still holds before it ends.
        lorafleet("down", *state, environment=environment)
    by_id = {span.span_id: (service, span) for service, span in collector.spans}
    ((service, generation),) = [
        (service, span) for service, span in collector.spans if span.name == "text_completion tiny"
    ]
    chain = [(service, generation.name)]
    span = generation
    while span.parent_span_id.hex() != CALLER_SPAN:
        service, span = by_id[span.parent_span_id]
        chain.append((service, span.name))
    generate = "lorafleet.inference.v1.InferenceService/Generate"
    assert chain[:-1] == [
        ("lorafleet-inference", "text_completion tiny"),
        ("lorafleet-inference", generate),
        ("lorafleet-gateway", generate),
    ]
    assert chain[-1][0] == "lorafleet-gateway"
    assert "/v1/completions" in chain[-1][1]
    attributes = plain(generation.attributes)
    usage = answer.json()["usage"]
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.max_tokens"] == 4
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    # Its time in the engine, in parts.
    parts = ("lorafleet.queue_seconds", "lorafleet.prefill_seconds", "lorafleet.decode_seconds")
    assert all(attributes[part] >= 0 for part in parts)
    assert [event.name for event in generation.events] == ["lorafleet.queued", "lorafleet.first_token"]
