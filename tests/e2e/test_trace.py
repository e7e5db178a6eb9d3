"""Traces of a real fleet, as a collector receives them: a request, and a job up to its first request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from openai import OpenAI
from openai.types import CompletionUsage
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from tests.support.models import make_tiny_llama

BASE = "tiny"
REQUEST_TRACE = "0af7651916cd43dd8448eb211c80319c"
JOB_TRACE = "1bf7651916cd43dd8448eb211c80319c"
FIRST_TRACE = "2cf7651916cd43dd8448eb211c80319c"
CALLER_SPAN = "b7ad6b7169203331"
GENERATE = "lorafleet.inference.v1.InferenceService/Generate"
CREATE_JOB = "lorafleet.trainer.v1.TrainerService/CreateJob"
PUBLISH = "lorafleet.registry.v1.AdapterService/PublishVersion"
INFERENCE, GATEWAY, TRAINER, REGISTRY = (
    f"lorafleet-{name}" for name in ("inference", "gateway", "trainer", "registry")
)
SERVER = 2
ROWS = [{"prompt": f"say {number}\n", "completion": f"number {number}"} for number in range(8)]
JOB_SECONDS = 300.0
_PACKAGE = "opentelemetry.proto.collector"

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Received:
    """A span and the service that sent it."""

    service: str
    span: Any

    @property
    def name(self) -> str:
        return str(self.span.name)

    @property
    def attributes(self) -> dict[str, Any]:
        return plain(self.span.attributes)

    @property
    def id(self) -> tuple[str, str]:
        return self.span.trace_id.hex(), self.span.span_id.hex()

    @property
    def links(self) -> list[tuple[str, str]]:
        return [(link.trace_id.hex(), link.span_id.hex()) for link in self.span.links]


class Collector:
    """An OTLP collector that keeps all spans."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
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
            self.spans += [
                Received(names["service.name"], span) for scope in group.scope_spans for span in scope.spans
            ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def _metrics(self, request: Any, context: Any) -> Any:
        return metrics_service_pb2.ExportMetricsServiceResponse()


@dataclass(frozen=True, slots=True)
class Traces:
    """What a fleet sent in its life, and what its callers saw."""

    spans: list[Received]
    usage: CompletionUsage
    fine_tuned_model: str

    def named(self, name: str, *, trace: str | None = None) -> list[Received]:
        return [each for each in self.spans if each.name == name and (trace is None or each.id[0] == trace)]

    def to_the_caller(self, received: Received) -> list[tuple[str, str]]:
        """Return service and name of each span from this one up to the one that the caller's is parent of."""
        by_id = {each.id: each for each in self.spans}
        chain = [(received.service, received.name)]
        while received.span.parent_span_id.hex() != CALLER_SPAN:
            received = by_id[(received.id[0], received.span.parent_span_id.hex())]
            chain.append((received.service, received.name))
        return chain


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traces]:
    """Run a fleet: a request to the base, a job, the first request to what it made."""
    folder = tmp_path_factory.mktemp("traced")
    collector = Collector()
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
    state = ("--state", str(folder / "state"))
    base = ("--base", str(make_tiny_llama(folder / "base")), "--base-name", BASE)
    started = lorafleet("up", *state, *base, environment=environment)
    try:
        with OpenAI(base_url=started["base_url"], api_key=started["api_key"], timeout=120) as client:
            usage = complete(client, BASE, REQUEST_TRACE)
            model = fine_tune(client, JOB_TRACE)
            complete(client, model, FIRST_TRACE)
    finally:
        # Every process sends what it still holds before it ends.
        lorafleet("down", *state, environment=environment)
    yield Traces(collector.spans, usage, model)
    collector.stop()


def test_a_request_is_one_trace_from_http_to_the_first_token(traces: Traces) -> None:
    (generation,) = traces.named(f"text_completion {BASE}", trace=REQUEST_TRACE)
    chain = traces.to_the_caller(generation)
    assert chain[:-1] == [
        (INFERENCE, f"text_completion {BASE}"),
        (INFERENCE, GENERATE),
        (GATEWAY, GENERATE),
    ]
    assert chain[-1][0] == GATEWAY
    assert "/v1/completions" in chain[-1][1]
    attributes = generation.attributes
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.provider.name"] == "lorafleet"
    assert attributes["gen_ai.request.model"] == BASE
    assert attributes["gen_ai.request.max_tokens"] == 4
    assert attributes["gen_ai.usage.input_tokens"] == traces.usage.prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"] == traces.usage.completion_tokens
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    # Its time in the engine, in parts.
    parts = ("lorafleet.queue_seconds", "lorafleet.prefill_seconds", "lorafleet.decode_seconds")
    assert all(attributes[part] >= 0 for part in parts)
    assert [event.name for event in generation.span.events] == ["lorafleet.queued", "lorafleet.first_token"]
    # The base was not published by anybody.
    assert generation.links == []


def test_a_job_is_one_trace_from_http_to_its_published_version(traces: Traces) -> None:
    (run,) = traces.named(f"fine_tune {BASE}")
    assert run.id[0] == JOB_TRACE
    chain = traces.to_the_caller(run)
    assert chain[:-1] == [(TRAINER, f"fine_tune {BASE}"), (TRAINER, CREATE_JOB), (GATEWAY, CREATE_JOB)]
    assert "/v1/fine_tuning/jobs" in chain[-1][1]
    assert run.attributes["lorafleet.job.state"] == "succeeded"
    assert run.attributes["lorafleet.job.attempt"] == 1
    said = [plain(event.attributes)["lorafleet.job.message"] for event in run.span.events]
    assert said[-1] == "The job has successfully completed"
    publication = published(traces)[-1]
    assert publication.span.parent_span_id == run.span.span_id
    # The validation belongs to it as well: it read the file, as the run did.
    download = "lorafleet.registry.v1.FileService/DownloadFile"
    read = [each for each in traces.named(download, trace=JOB_TRACE) if each.span.kind == SERVER]
    assert len(read) >= 2


def test_the_first_request_and_the_load_link_to_the_publication(traces: Traces) -> None:
    *candidates, publication = published(traces)
    of_request = [each for each in traces.spans if each.id[0] == FIRST_TRACE]
    (generation,) = [each for each in of_request if each.name.startswith("text_completion ")]
    assert generation.links == [publication.id]
    # The parity gate had the same bytes loaded already, under the name of its candidate.
    published_as = {each.id for each in (*candidates, publication)}
    (load,) = [each for each in traces.spans if each.name.startswith("fetch_adapter ")]
    assert load.service == INFERENCE
    assert set(load.links) <= published_as
    assert load.links
    (run,) = traces.named(f"fine_tune {BASE}")
    digest = run.attributes["lorafleet.version.digest"]
    assert load.attributes["lorafleet.version.digest"] == digest
    assert generation.attributes["lorafleet.version.digest"] == digest
    # What the registry did for the load is in its trace.
    downloads = traces.named("lorafleet.registry.v1.AdapterService/DownloadVersion", trace=load.id[0])
    assert {each.span.parent_span_id for each in downloads} == {load.span.span_id}


def published(traces: Traces) -> list[Received]:
    """Return the publications in the job's trace as the registry saw them; the job's version comes last."""
    found = [each for each in traces.named(PUBLISH, trace=JOB_TRACE) if each.service == REGISTRY]
    return sorted(found, key=lambda each: int(each.span.start_time_unix_nano))


def complete(client: OpenAI, model: str, trace: str) -> CompletionUsage:
    answer = client.completions.create(
        model=model, prompt="Hello", max_tokens=4, temperature=0, extra_headers=headers(trace)
    )
    assert answer.usage is not None
    return answer.usage


def fine_tune(client: OpenAI, trace: str) -> str:
    """Run a job to its end and return the name of the model."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    file = client.files.create(file=("rows.jsonl", lines), purpose="fine-tune")
    parameters: Any = {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="traced",
        seed=1,
        method={"type": "supervised", "supervised": parameters},
        extra_headers=headers(trace),
    )
    deadline = time.monotonic() + JOB_SECONDS
    while job.status not in {"succeeded", "failed", "cancelled"}:
        assert time.monotonic() < deadline, job.status
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.fine_tuned_model is not None, job.error
    return job.fine_tuned_model


def headers(trace: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{CALLER_SPAN}-01"}


def lorafleet(*arguments: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run the command line with --json and return what it printed."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
