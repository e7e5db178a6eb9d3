"""The spans of inference, and the names of the semantic conventions for generative AI, kept in this place.

What runs on an adapter links to the publication of its version, which is in the trace of its job.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, Status, StatusCode, use_span

from services.common import metrics, telemetry
from services.common.errors import LorafleetError
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import SamplingParams
from services.inference.sources import AdapterSource

OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
REQUEST_MODEL = "gen_ai.request.model"
REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE = "gen_ai.request.temperature"
REQUEST_TOP_P = "gen_ai.request.top_p"
REQUEST_TOP_K = "gen_ai.request.top_k"
REQUEST_SEED = "gen_ai.request.seed"
REQUEST_CHOICE_COUNT = "gen_ai.request.choice.count"
REQUEST_STOP_SEQUENCES = "gen_ai.request.stop_sequences"
REQUEST_FREQUENCY_PENALTY = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY = "gen_ai.request.presence_penalty"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
VERSION_DIGEST = "lorafleet.version.digest"
QUEUE_SECONDS = "lorafleet.queue_seconds"
PREFILL_SECONDS = "lorafleet.prefill_seconds"
DECODE_SECONDS = "lorafleet.decode_seconds"
EVENT_QUEUED = "lorafleet.queued"
EVENT_FIRST_TOKEN = "lorafleet.first_token"  # noqa: S105 - no password
ERROR_TYPE = "error.type"

CHAT = "chat"
TEXT_COMPLETION = "text_completion"
EMBEDDINGS = "embeddings"


_first_token_seconds = metrics.histogram("lorafleet.inference.time_to_first_token")
_queue_seconds = metrics.histogram("lorafleet.inference.queue.duration")
_inter_token_seconds = metrics.histogram("lorafleet.inference.inter_token.duration")


class GenerationTrace:
    """Writes what becomes of one generation on its span, and measures the times of its tokens."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._queued_at = time.monotonic()
        self._first_token_at: float | None = None
        self._finish_reasons: list[str] = []
        self._output_tokens = 0
        self._last_token_at: dict[int, float] = {}

    @property
    def has_begun(self) -> bool:
        """Whether tokens have come."""
        return self._first_token_at is not None

    def queued(self, source: AdapterSource | None, params: SamplingParams, prompt_tokens: int) -> None:
        """Note the version, the parameters and that the request now waits for the engine."""
        self._queued_at = time.monotonic()
        note_version(self._span, source)
        attributes: dict[str, str | int | float | tuple[str, ...] | None] = {
            REQUEST_MAX_TOKENS: params.max_tokens,
            REQUEST_TEMPERATURE: params.temperature,
            REQUEST_TOP_P: params.top_p,
            REQUEST_TOP_K: params.top_k,
            REQUEST_SEED: params.seed,
            REQUEST_FREQUENCY_PENALTY: params.frequency_penalty,
            REQUEST_PRESENCE_PENALTY: params.presence_penalty,
            REQUEST_STOP_SEQUENCES: params.stop or None,
            # Only told where it is not one.
            REQUEST_CHOICE_COUNT: None if params.n == 1 else params.n,
            USAGE_INPUT_TOKENS: prompt_tokens,
        }
        for name, value in attributes.items():
            if value is not None:
                self._span.set_attribute(name, value)
        self._span.add_event(EVENT_QUEUED)

    def produced(self, events: list[TokenEvent]) -> None:
        """Note new tokens: the first one ends the prefill."""
        now = time.monotonic()
        if self._first_token_at is None:
            self._first_token_at = now
            waited_seconds = self._first_token_at - self._queued_at
            queue_seconds = min(events[0].queue_seconds, waited_seconds)
            _first_token_seconds.record(waited_seconds)
            _queue_seconds.record(queue_seconds)
            self._span.add_event(EVENT_FIRST_TOKEN)
            self._span.set_attribute(QUEUE_SECONDS, queue_seconds)
            self._span.set_attribute(PREFILL_SECONDS, waited_seconds - queue_seconds)
            self._span.set_attribute(USAGE_CACHE_READ_INPUT_TOKENS, events[0].cached_tokens)
        self._measure_gaps(events, now)
        for event in events:
            self._output_tokens += len(event.token_ids)
            if event.finish_reason is not None:
                self._finish_reasons.append(event.finish_reason.value)

    def _measure_gaps(self, events: list[TokenEvent], now: float) -> None:
        """Record the time between tokens of each completion; those that came together share it."""
        new = Counter[int]()
        for event in events:
            new[event.index] += len(event.token_ids)
        for index, count in new.items():
            last = self._last_token_at.get(index)
            if last is not None:
                for _ in range(count):
                    _inter_token_seconds.record((now - last) / count)
            if count:
                self._last_token_at[index] = now

    def ended(self) -> None:
        """Note the totals."""
        self._span.set_attribute(USAGE_OUTPUT_TOKENS, self._output_tokens)
        self._span.set_attribute(RESPONSE_FINISH_REASONS, self._finish_reasons)
        if self._first_token_at is not None:
            self._span.set_attribute(DECODE_SECONDS, time.monotonic() - self._first_token_at)


@contextmanager
def generation_span(operation: str, model: str) -> Iterator[GenerationTrace]:
    """Open the span of one generation as a child of the present call's; it ends with the body."""
    with _operation_span(operation, model) as span:
        trace = GenerationTrace(span)
        try:
            yield trace
        finally:
            trace.ended()


@contextmanager
def embeddings_span(model: str) -> Iterator[Span]:
    """Open the span of one call for embeddings as a child of the present call's; it ends with the body."""
    with _operation_span(EMBEDDINGS, model) as span:
        yield span


@contextmanager
def fetch_span(source: AdapterSource) -> Iterator[None]:
    """Make a span of the body, which fetches a version. It belongs to no request: many may wait for it."""
    span = telemetry.tracer().start_span(f"fetch_adapter {source.adapter}")
    note_version(span, source)
    with _ended(span), use_span(span, record_exception=False, set_status_on_exception=False):
        yield


def note_version(span: Span, source: AdapterSource | None) -> None:
    """Tell the version that `span` is about, and link the span to its publication; nothing for the base."""
    if source is None:
        return
    span.set_attribute(RESPONSE_MODEL, source.version_ref)
    span.set_attribute(VERSION_DIGEST, source.digest)
    telemetry.link(span, source.traceparent)


@contextmanager
def _operation_span(operation: str, model: str) -> Iterator[Span]:
    attributes = {OPERATION: operation, PROVIDER: "lorafleet", REQUEST_MODEL: model}
    span = telemetry.tracer().start_span(f"{operation} {model}", attributes=attributes)
    with _ended(span):
        yield span


@contextmanager
def _ended(span: Span) -> Iterator[None]:
    """End `span` with the body, as an error where the body raises one of ours."""
    try:
        yield
    except LorafleetError as error:
        span.set_attribute(ERROR_TYPE, error.reason)
        span.set_status(Status(StatusCode.ERROR, error.reason))
        raise
    finally:
        span.end()
