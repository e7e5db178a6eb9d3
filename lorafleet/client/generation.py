"""Asking the base or an adapter: completions, scores, embeddings, and what is resident."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafleet.client.connection import AnswerT, Connection
from lorafleet.inference.v1 import generation_pb2 as messages
from lorafleet.inference.v1 import inference_service_pb2 as calls
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.errors import Internal

_REASONS = {
    messages.FINISH_REASON_STOP: "stop",
    messages.FINISH_REASON_LENGTH: "length",
    messages.FINISH_REASON_ABORTED: "aborted",
}

Prompt = str | Sequence[int] | Sequence[messages.ChatMessage]
"""A text, token ids, or a conversation."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion as it is made. Always whole characters.

    Attributes:
        index: which of the n completions.
        finish_reason: `stop`, `length` or `aborted` in the last piece of a completion, else empty.
        usage: in the last piece of a completion.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[messages.PositionLogprobs, ...] = ()
    finish_reason: str = ""
    usage: messages.Usage | None = None


@dataclass(slots=True)
class Completion:
    """One whole answer.

    Attributes:
        version: `name:3`, the version that answered; empty for the base.
        version_digest: its digest.
    """

    version: str
    version_digest: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[messages.PositionLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class AsyncInference:
    """The base that is served and every adapter on it. `model` is an adapter's `ref`; None is the base."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = InferenceServiceStub(connection.channel)

    async def generate(self, prompt: Prompt, *, model: str | None = None, **sampling: Any) -> Completion:
        """Return the answer to one prompt.

        Args:
            sampling: fields of the contract's `SamplingParams`, such as `max_tokens` or `temperature`; for
                more than one answer (`n`) use `stream`.

        Raises:
            LorafleetError: see `Generate` in the contract.
        """
        completion: Completion | None = None
        async for message in self._messages(prompt, model, sampling):
            if message.HasField("started"):
                completion = Completion(message.started.version_ref, message.started.version_digest)
            elif completion is not None:
                _add(completion, message)
        if completion is None:
            raise Internal("incomplete_answer", "the stream ended before it began")
        return completion

    async def stream(
        self, prompt: Prompt, *, model: str | None = None, **sampling: Any
    ) -> AsyncIterator[Chunk]:
        """Yield the answer as it is made; leaving early ends the work. Arguments as `generate`."""
        async for message in self._messages(prompt, model, sampling):
            if message.HasField("delta"):
                delta = message.delta
                yield Chunk(delta.index, delta.text, tuple(delta.token_ids), tuple(delta.logprobs))
            elif message.HasField("finished"):
                ended = message.finished
                yield Chunk(ended.index, "", finish_reason=_REASONS[ended.reason], usage=ended.usage)

    async def score(
        self, prompt: Prompt, completions: Sequence[str], *, model: str | None = None
    ) -> list[calls.CompletionScore]:
        """Return the log-probability of each completion after the prompt."""
        request = calls.ScoreRequest(model=_model(model), completions=completions, **_prompt(prompt))
        return list((await self._call(self._stub.Score, request, calls.ScoreResponse)).scores)

    async def embed(self, inputs: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Return the mean of the last hidden states of each input."""
        request = calls.EmbedRequest(model=_model(model), inputs=inputs)
        return [
            list(item.values)
            for item in (await self._call(self._stub.Embed, request, calls.EmbedResponse)).embeddings
        ]

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, as a text prompt is encoded."""
        return list(
            (
                await self._call(
                    self._stub.Tokenize, calls.TokenizeRequest(text=text), calls.TokenizeResponse
                )
            ).token_ids
        )

    async def status(self) -> calls.EngineStatus:
        """Return what the engine holds and does."""
        return await self._call(self._stub.GetStatus, calls.GetStatusRequest(), calls.EngineStatus)

    async def resident(self) -> list[calls.ResidentAdapter]:
        """Return the adapters that are loaded or loading."""
        return list(
            (
                await self._call(
                    self._stub.ListResident, calls.ListResidentRequest(), calls.ListResidentResponse
                )
            ).adapters
        )

    async def prefetch(self, ref: str) -> calls.ResidentAdapter:
        """Load a version as far as host memory."""
        return await self._call(
            self._stub.Prefetch, calls.PrefetchRequest(adapter=ref), calls.ResidentAdapter
        )

    async def evict(self, ref: str) -> None:
        """Drop a version from every tier; raise `FailedPrecondition` (`adapter_in_use`) where it runs."""
        await self._call(self._stub.Evict, calls.EvictRequest(adapter=ref), calls.EvictResponse)

    async def pin(self, ref: str) -> calls.ResidentAdapter:
        """Keep a version on the device."""
        return await self._call(self._stub.Pin, calls.PinRequest(adapter=ref), calls.ResidentAdapter)

    async def unpin(self, ref: str) -> calls.ResidentAdapter:
        """Let a version go again."""
        return await self._call(self._stub.Unpin, calls.UnpinRequest(adapter=ref), calls.ResidentAdapter)

    def _messages(
        self, prompt: Prompt, model: str | None, sampling: dict[str, Any]
    ) -> AsyncIterator[messages.GenerateResponse]:
        request = messages.GenerateRequest(
            model=_model(model), sampling=messages.SamplingParams(**sampling), **_prompt(prompt)
        )
        return self._connection.stream(self._stub.Generate, request)

    async def _call(self, method: Any, request: Any, answer: type[AnswerT]) -> AnswerT:
        return await self._connection.call(method, request, answer)


def _model(ref: str | None) -> messages.ModelRef:
    return messages.ModelRef(base=True) if ref is None else messages.ModelRef(adapter=ref)


def _prompt(prompt: Prompt) -> dict[str, Any]:
    """Return the prompt as the field of a request that it belongs in."""
    if isinstance(prompt, str):
        return {"text": prompt}
    if prompt and isinstance(prompt[0], messages.ChatMessage):
        return {"chat": messages.ChatPrompt(messages=prompt)}  # type: ignore[arg-type]
    return {"tokens": messages.TokenPrompt(token_ids=prompt)}  # type: ignore[arg-type]


def _add(completion: Completion, message: messages.GenerateResponse) -> None:
    if message.HasField("delta"):
        completion.text += message.delta.text
        completion.token_ids += message.delta.token_ids
        completion.logprobs += message.delta.logprobs
    elif message.HasField("finished"):
        usage = message.finished.usage
        completion.finish_reason = _REASONS[message.finished.reason]
        completion.prompt_tokens = usage.prompt_tokens
        completion.completion_tokens = usage.completion_tokens
        completion.cached_tokens = usage.cached_tokens
