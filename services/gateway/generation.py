"""One or more `Generate` calls as one answer: admitted together, read together, cancelled together."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from lorafleet.inference.v1.generation_pb2 import (
    Delta,
    Finished,
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    PositionLogprobs,
    Started,
    Usage,
)
from services.common.errors import Internal, LorafleetError, Unavailable
from services.gateway.errors import from_upstream
from services.gateway.metering import Charge
from services.gateway.upstream_fields import in_http_terms
from services.gateway.usage import Counts

if TYPE_CHECKING:
    from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

_EVENTS_AHEAD = 64
_FINISH_REASONS: dict[FinishReason.ValueType, str] = {
    FinishReason.FINISH_REASON_STOP: "stop",
    FinishReason.FINISH_REASON_LENGTH: "length",
}

Event = tuple[int, Delta | Finished]
"""An event and the number of the prompt that it belongs to."""


class Generation:
    """One admitted call."""

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse], fields: Mapping[str, str]
    ) -> None:
        self._call = call
        self._fields = fields
        self._responses: AsyncIterator[GenerateResponse] = aiter(call)
        self._completions = 0
        self.started = Started()

    async def admit(self, completions: int) -> None:
        """Wait until inference has taken the request.

        Raises:
            LorafleetError: what inference refused, with the field named as the HTTP API names it.
        """
        self._completions = completions
        first = await self._next()
        if first is None or first.WhichOneof("event") != "started":
            raise Internal("incomplete_answer", "inference sent no beginning")
        self.started = first.started

    async def events(self) -> AsyncGenerator[Delta | Finished]:
        """Yield what follows until every completion has finished.

        Raises:
            LorafleetError: the generation failed or was ended by the server.
        """
        unfinished = self._completions
        while (response := await self._next()) is not None:
            if response.WhichOneof("event") == "delta":
                yield response.delta
            elif response.WhichOneof("event") == "finished":
                unfinished -= 1
                yield response.finished
        if unfinished:
            raise Internal("incomplete_answer", "inference ended the answer before its end")

    def cancel(self) -> None:
        """End the call and the work behind it; nothing happens when it has ended."""
        self._call.cancel()

    async def _next(self) -> GenerateResponse | None:
        try:
            return await anext(self._responses, None)
        except grpc.RpcError as error:
            raise in_http_terms(from_upstream(error), self._fields) from error


class GenerationGroup:
    """The calls of one HTTP request, one for each of its prompts."""

    def __init__(self, generations: Sequence[Generation], charge: Charge) -> None:
        self._generations = generations
        self._charge = charge
        self._generated_tokens = 0
        self._cached_tokens: dict[int, int] = {}

    @property
    def started(self) -> list[Started]:
        """How inference began each prompt."""
        return [generation.started for generation in self._generations]

    @property
    def fingerprint(self) -> str:
        """A short name for what answers: base values and adapter version; OpenAI's `system_fingerprint`."""
        first = self._generations[0].started
        text = f"{first.base_fingerprint_digest} {first.version_digest}"
        return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def headers(self) -> dict[str, str]:
        """Which adapter version answers, and what is left of the key's limits, as response headers."""
        first = self._generations[0].started
        if not first.version_digest:
            return dict(self._charge.headers)
        return {
            **self._charge.headers,
            "x-lorafleet-version": first.version_ref,
            "x-lorafleet-digest": first.version_digest,
        }

    async def events(self) -> AsyncGenerator[Event]:
        """Yield the events of all calls as they come; a failure of one ends them all."""
        try:
            async with aclosing(self._merged()) as merged:
                async for item in merged:
                    self._count(*item)
                    yield item
        finally:
            self.cancel()

    async def _merged(self) -> AsyncGenerator[Event]:
        if len(self._generations) == 1:
            # The common case: no queue and no task stand between the call and whoever reads it.
            async with aclosing(self._generations[0].events()) as events:
                async for event in events:
                    yield 0, event
            return
        queue: asyncio.Queue[Event | LorafleetError | None] = asyncio.Queue(_EVENTS_AHEAD)
        pumps = [
            asyncio.create_task(_pump(number, generation, queue))
            for number, generation in enumerate(self._generations)
        ]
        try:
            running = len(pumps)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, LorafleetError):
                    raise item
                else:
                    yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def cancel(self) -> None:
        """End all calls, and settle for what they have used."""
        for generation in self._generations:
            generation.cancel()
        used = Counts(
            prompt_tokens=sum(started.prompt_tokens for started in self.started),
            cached_tokens=sum(self._cached_tokens.values()),
            completion_tokens=self._generated_tokens,
        )
        self._charge.settle(used, self._generations[0].started.version_ref.partition(":")[0])

    def _count(self, prompt: int, item: Delta | Finished) -> None:
        """Count as it comes: an answer that is broken off has been worked for too."""
        if isinstance(item, Delta):
            self._generated_tokens += len(item.token_ids)
        else:
            self._cached_tokens.setdefault(prompt, item.usage.cached_tokens)


async def admit(
    inference: InferenceServiceAsyncStub,
    requests: Sequence[GenerateRequest],
    *,
    completions: int,
    timeout_seconds: float,
    fields: Mapping[str, str],
    charge: Charge,
) -> GenerationGroup:
    """Start one call per request and return when all are admitted; when one is refused, none goes on.

    Args:
        inference: who answers.
        requests: one for each prompt.
        completions: how many each prompt gets.
        timeout_seconds: for each call as a whole.
        fields: how the HTTP request names inference's fields.
        charge: what the request reserved; the group settles it.

    Raises:
        LorafleetError: the first refusal.
    """
    generations = [
        Generation(inference.Generate(request, timeout=timeout_seconds), fields) for request in requests
    ]
    group = GenerationGroup(generations, charge)
    waiting = [asyncio.create_task(generation.admit(completions)) for generation in generations]
    try:
        await asyncio.gather(*waiting)
    except BaseException:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        group.cancel()
        raise
    return group


async def _pump(
    number: int, generation: Generation, queue: asyncio.Queue[Event | LorafleetError | None]
) -> None:
    last: LorafleetError | None = None
    try:
        async for item in generation.events():
            await queue.put((number, item))
    except LorafleetError as error:
        last = error
    await queue.put(last)


def finish_reason(finished: Finished) -> str:
    """Return OpenAI's word for why a completion ended; raise `Unavailable` where the server gave it up."""
    word = _FINISH_REASONS.get(finished.reason)
    if word is not None:
        return word
    raise Unavailable("generation_aborted", "the server ended the generation before its end")


@dataclass(slots=True)
class Choice:
    """One finished completion."""

    text: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(slots=True)
class TokenCounts:
    """Tokens of one answer. A prompt counts once, however many completions it has."""

    prompts: dict[int, Usage] = field(default_factory=dict)
    completion_tokens: int = 0

    def add(self, prompt: int, usage: Usage) -> None:
        """Count one finished completion of a prompt."""
        self.prompts.setdefault(prompt, usage)
        self.completion_tokens += usage.completion_tokens

    def object(self) -> dict[str, object]:
        """Return OpenAI's `usage` object."""
        prompt_tokens = sum(usage.prompt_tokens for usage in self.prompts.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens for usage in self.prompts.values())
            },
        }


async def collect(group: GenerationGroup, completions: int) -> tuple[list[Choice], TokenCounts]:
    """Read an answer to its end and return its choices, prompt by prompt."""
    choices = [Choice() for _ in range(len(group.started) * completions)]
    counts = TokenCounts()
    async for prompt, item in group.events():
        choice = choices[prompt * completions + item.index]
        if isinstance(item, Delta):
            choice.text.append(item.text)
            choice.logprobs.extend(item.logprobs)
        else:
            choice.finish_reason = finish_reason(item)
            counts.add(prompt, item.usage)
    return choices, counts
