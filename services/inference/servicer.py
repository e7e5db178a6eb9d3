"""The gRPC face of the engine: each method checks, calls, translates and returns."""

# gRPC names methods in CamelCase.
# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import grpc

from lorafleet.inference.v1.generation_pb2 import GenerateRequest, GenerateResponse, Started, Usage
from lorafleet.inference.v1.inference_service_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    Embedding,
    EmbedRequest,
    EmbedResponse,
    EngineStatus,
    EvictRequest,
    EvictResponse,
    GetStatusRequest,
    ListResidentRequest,
    ListResidentResponse,
    PinRequest,
    PrefetchRequest,
    ResidentAdapter,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
    UnpinRequest,
    WatchStatusRequest,
)
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from services.common import call_context
from services.common.errors import InvalidArgument
from services.inference import telemetry
from services.inference.admission import Admitted
from services.inference.chat import Conversation
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request
from services.inference.one_shot import last_events
from services.inference.runtime import Runtime, Startup
from services.inference.streams import stream_events

SERVICE = "lorafleet.inference.v1.InferenceService"
MIN_INTERVAL_SECONDS = 0.1
MAX_INTERVAL_SECONDS = 60.0

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(InferenceServiceServicer):
    """`lorafleet.inference.v1.InferenceService`."""

    def __init__(self, startup: Startup) -> None:
        self._startup = startup
        self._draining = asyncio.Event()

    async def drain(self) -> None:
        """End the status streams, which would otherwise last as long as their callers."""
        self._draining.set()

    async def Generate(self, request: GenerateRequest, context: Context) -> AsyncIterator[GenerateResponse]:
        runtime = self._startup.require()
        operation = telemetry.CHAT if request.WhichOneof("prompt") == "chat" else telemetry.TEXT_COMPLETION
        with telemetry.generation_span(operation, request.model.adapter or runtime.base_name) as trace:
            admitted = await runtime.admission.generate(request)
            engine_request = admitted.request
            trace.queued(admitted.source, engine_request.sampling, len(engine_request.prompt_token_ids))
            async with (
                aclosing(stream_events(runtime.driver, engine_request)) as events,
                aclosing(_held_for_prompt(events, engine_request)) as batches,
            ):
                async for batch in batches:
                    is_first = not trace.has_begun
                    trace.produced(batch)
                    if is_first:
                        yield GenerateResponse(started=_started(runtime, admitted, batch))
                    for response in runtime.converter.responses(batch):
                        yield response

    async def Score(self, request: ScoreRequest, context: Context) -> ScoreResponse:
        runtime = self._startup.require()
        admitted = await runtime.admission.score(request)
        events = await last_events(runtime.driver, admitted.requests)
        scores = [runtime.converter.completion_score(event, admitted.prompt_tokens) for event in events]
        return ScoreResponse(
            version_digest="" if admitted.source is None else admitted.source.digest,
            scores=scores,
            usage=Usage(
                prompt_tokens=admitted.prompt_tokens,
                completion_tokens=sum(len(score.tokens) for score in scores),
            ),
        )

    async def Embed(self, request: EmbedRequest, context: Context) -> EmbedResponse:
        runtime = self._startup.require()
        with telemetry.embeddings_span(request.model.adapter or runtime.base_name) as span:
            admitted = await runtime.admission.embed(request)
            telemetry.note_version(span, admitted.source)
            events = await last_events(runtime.driver, admitted.requests)
            prompt_tokens = sum(event.prompt_tokens for event in events)
            span.set_attribute(telemetry.USAGE_INPUT_TOKENS, prompt_tokens)
        return EmbedResponse(
            version_digest="" if admitted.source is None else admitted.source.digest,
            embeddings=[Embedding(values=event.embedding) for event in events],
            usage=Usage(prompt_tokens=prompt_tokens),
        )

    async def Tokenize(self, request: TokenizeRequest, context: Context) -> TokenizeResponse:
        encoder = self._startup.require().encoder
        match request.WhichOneof("input"):
            case "text":
                token_ids = await asyncio.to_thread(encoder.encode_text, request.text)
            case "chat":
                token_ids = await asyncio.to_thread(Conversation.read(request.chat).encode, encoder)
            case None:
                raise InvalidArgument(
                    "invalid_value", "Text or messages are required.", field="input", limit="text or chat"
                )
        return TokenizeResponse(
            token_ids=token_ids, tokens=[encoder.token_bytes[token_id] for token_id in token_ids]
        )

    async def Detokenize(self, request: DetokenizeRequest, context: Context) -> DetokenizeResponse:
        encoder = self._startup.require().encoder
        return DetokenizeResponse(text=await asyncio.to_thread(encoder.decode, request.token_ids))

    async def Prefetch(self, request: PrefetchRequest, context: Context) -> ResidentAdapter:
        runtime = self._startup.require()
        source = await runtime.resolve(request.adapter, field="adapter")
        return await runtime.residency.prefetch(source)

    async def Evict(self, request: EvictRequest, context: Context) -> EvictResponse:
        runtime = self._startup.require()
        source = await runtime.resolve_here(request.adapter, field="adapter")
        await runtime.residency.evict(source)
        return EvictResponse()

    async def Pin(self, request: PinRequest, context: Context) -> ResidentAdapter:
        runtime = self._startup.require()
        source = await runtime.resolve(request.adapter, field="adapter")
        return await runtime.residency.pin(source)

    async def Unpin(self, request: UnpinRequest, context: Context) -> ResidentAdapter:
        runtime = self._startup.require()
        source = await runtime.resolve_here(request.adapter, field="adapter")
        return await runtime.residency.unpin(source)

    async def ListResident(self, request: ListResidentRequest, context: Context) -> ListResidentResponse:
        residency = self._startup.require().residency
        return ListResidentResponse(adapters=residency.list(call_context.current_tenant()))

    async def GetStatus(self, request: GetStatusRequest, context: Context) -> EngineStatus:
        return self._startup.require().status()

    async def WatchStatus(self, request: WatchStatusRequest, context: Context) -> AsyncIterator[EngineStatus]:
        runtime = self._startup.require()
        interval_seconds = _interval_seconds(request)
        while not self._draining.is_set():
            yield runtime.status()
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_seconds):
                    await self._draining.wait()


async def _held_for_prompt(
    batches: AsyncGenerator[list[TokenEvent], None], request: Request
) -> AsyncGenerator[list[TokenEvent], None]:
    """Hold events back until the one that brings the prompt's log-probabilities, where they are wanted."""
    held: list[TokenEvent] = []
    is_held = request.sampling.prompt_logprobs is not None
    async for batch in batches:
        held += batch
        is_held = is_held and all(event.prompt_logprobs is None for event in held)
        if not is_held:
            yield held
            held = []


def _started(runtime: Runtime, admitted: Admitted, batch: list[TokenEvent]) -> Started:
    prompt_logprobs = next(
        (event.prompt_logprobs for event in batch if event.prompt_logprobs is not None), ()
    )
    return Started(
        request_id=call_context.request_id() or admitted.request.id,
        version_digest="" if admitted.source is None else admitted.source.digest,
        version_ref="" if admitted.source is None else admitted.source.version_ref,
        prompt_tokens=len(admitted.request.prompt_token_ids),
        base_fingerprint_digest=runtime.base_fingerprint_digest,
        prompt_logprobs=runtime.converter.positions(prompt_logprobs),
    )


def _interval_seconds(request: WatchStatusRequest) -> float:
    if not request.HasField("interval_seconds"):
        return 1.0
    if not MIN_INTERVAL_SECONDS <= request.interval_seconds <= MAX_INTERVAL_SECONDS:
        limit = f"{MIN_INTERVAL_SECONDS:g} to {MAX_INTERVAL_SECONDS:g}"
        raise InvalidArgument(
            "invalid_value",
            f"interval_seconds is {request.interval_seconds}; it must be {limit}.",
            field="interval_seconds",
            value=request.interval_seconds,
            limit=limit,
        )
    return request.interval_seconds
