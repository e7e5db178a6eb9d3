"""The span of one generation: the names of the semantic conventions for generative AI, kept in this place."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Span, Status, StatusCode

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
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_FINISH_REASONS = "gen_ai.response.finish_reasons"
USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
VERSION_DIGEST = "lorafleet.version.digest"
QUEUE_SECONDS = "lorafleet.queue_seconds"
PREFILL_SECONDS = "lorafleet.prefill_seconds"
DECODE_SECONDS = "lorafleet.decode_seconds"
EVENT_QUEUED = "lorafleet.queued"
EVENT_FIRST_TOKEN = "lorafleet.first_token"  # noqa: S105 - no password
ERROR_TYPE = "error.type"

CHAT = "chat"
TEXT_COMPLETION = "text_completion"


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
        attributes: dict[str, str | int | float | None] = {
            RESPONSE_MODEL: None if source is None else source.version_ref,
            VERSION_DIGEST: None if source is None else source.digest,
            REQUEST_MAX_TOKENS: params.max_tokens,
            REQUEST_TEMPERATURE: params.temperature,
            REQUEST_TOP_P: params.top_p,
            REQUEST_TOP_K: params.top_k,
            REQUEST_SEED: params.seed,
            REQUEST_CHOICE_COUNT: params.n,
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
    span = telemetry.tracer().start_span(
        f"{operation} {model}",
        attributes={OPERATION: operation, PROVIDER: "lorafleet", REQUEST_MODEL: model},
    )
    trace = GenerationTrace(span)
    try:
        yield trace
    except LorafleetError as error:
        span.set_attribute(ERROR_TYPE, error.reason)
        span.set_status(Status(StatusCode.ERROR, error.reason))
        raise
    finally:
        trace.ended()
        span.end()
