"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorafleet.inference.v1.generation_pb2 import Delta, GenerateRequest, PositionLogprobs, TokenPrompt
from lorafleet.inference.v1.inference_service_pb2 import DetokenizeRequest, TokenizeRequest
from services.common.ids import new_id
from services.gateway.auth import principal_of, requires
from services.gateway.completion_request import CompletionRequest, Prompt
from services.gateway.disconnect import while_connected
from services.gateway.generation import GenerationGroup, TokenCounts, admit, collect, finish_reason
from services.gateway.json_body import json_body
from services.gateway.keys import Principal, Scope
from services.gateway.logprobs import CompletionLogprobs, joined
from services.gateway.model_choice import chosen_model
from services.gateway.sampling import sampling_params
from services.gateway.sse import EventStream
from services.gateway.state import Gateway, gateway_of
from services.gateway.upstream_fields import COMPLETION_FIELDS

router = APIRouter(dependencies=[Depends(requires(Scope.INFERENCE))])


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to be given back: its text, and its first token where log-probabilities are wanted."""

    text: str
    first_token: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """An admitted request: what was asked, and what answers. `echoes` has an entry per prompt, or none."""

    body: CompletionRequest
    id: str
    created: int
    group: GenerationGroup
    echoes: list[Echo]


@router.post("/v1/completions")
async def create_completion(
    request: Request, body: Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]
) -> Response:
    """Complete each prompt `n` times; as one object or, with `stream`, as events."""
    gateway = gateway_of(request)
    if body.stream:
        answer = await while_connected(request, _admit(gateway, principal_of(request), body))
        group = answer.group
        return EventStream(
            _chunks(answer), on_close=group.cancel, check=request.state.key_check, headers=group.headers
        )
    return await while_connected(request, _whole(gateway, principal_of(request), body))


async def _whole(gateway: Gateway, principal: Principal, body: CompletionRequest) -> Response:
    answer = await _admit(gateway, principal, body)
    collected, counts = await collect(answer.group, body.completions)
    choices = []
    for index, completion in enumerate(collected):
        report = _ChoiceReport(answer, index)
        text = report.prompt + "".join(completion.text)
        choices.append(_choice(index, text, report.first(completion.logprobs), completion.finish_reason))
    return JSONResponse(
        {**_frame(answer), "choices": choices, "usage": counts.object()}, headers=answer.group.headers
    )


async def _chunks(answer: Answer) -> AsyncGenerator[dict[str, Any]]:
    """Yield the stream's objects: the prompts where they are echoed, the deltas, the ends, the counts."""
    body, counts = answer.body, TokenCounts()
    usage: dict[str, Any] = {"usage": None} if body.wants_usage_in_stream else {}
    frame = {**_frame(answer), **usage}
    reports = [_ChoiceReport(answer, index) for index in range(len(body.prompts) * body.completions)]
    for index, report in enumerate(reports if body.echo else ()):
        yield {**frame, "choices": [_choice(index, report.prompt, report.first([]), None)]}
    async with aclosing(answer.group.events()) as events:
        async for prompt, item in events:
            index = prompt * body.completions + item.index
            if isinstance(item, Delta):
                if item.text or item.logprobs:
                    logprobs = reports[index].more(item.logprobs)
                    yield {**frame, "choices": [_choice(index, item.text, logprobs, None)]}
            else:
                counts.add(prompt, item.usage)
                yield {**frame, "choices": [_choice(index, "", None, finish_reason(item))]}
    if usage:
        yield {**frame, "choices": [], "usage": counts.object()}


async def _admit(gateway: Gateway, principal: Principal, body: CompletionRequest) -> Answer:
    prompts = body.prompts
    model = await chosen_model(gateway, principal.tenant, body.model, requests=len(prompts))
    echoes: list[Echo] = []
    if body.echo:
        echoes = list(await asyncio.gather(*(_echo(gateway, prompt) for prompt in prompts)))
    sampling = sampling_params(
        body,
        max_tokens=body.completion_limit,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    requests = [GenerateRequest(model=model, sampling=sampling) for _ in prompts]
    for generate, prompt in zip(requests, prompts, strict=True):
        if isinstance(prompt, str):
            generate.text = prompt
        else:
            generate.tokens.CopyFrom(TokenPrompt(token_ids=prompt))
    group = await admit(
        gateway.upstream.inference,
        requests,
        completions=body.completions,
        timeout_seconds=gateway.settings.stream_timeout_seconds,
        fields=COMPLETION_FIELDS,
        charge=await gateway.meter.charge(principal, body.about_tokens),
    )
    return Answer(body, new_id("cmpl"), int(time.time()), group, echoes)


async def _echo(gateway: Gateway, prompt: Prompt) -> Echo:
    inference = gateway.upstream.inference
    if isinstance(prompt, str):
        tokens = (await inference.Tokenize(TokenizeRequest(text=prompt))).tokens
        return Echo(prompt, tokens[0] if tokens else b"")
    text = (await inference.Detokenize(DetokenizeRequest(token_ids=prompt))).text
    first = (await inference.Detokenize(DetokenizeRequest(token_ids=prompt[:1]))).text
    return Echo(text, first.encode())


class _ChoiceReport:
    """The echoed prompt and the log-probabilities of one choice."""

    def __init__(self, answer: Answer, index: int) -> None:
        prompt = index // answer.body.completions
        self._echo = answer.echoes[prompt] if answer.echoes else None
        self._prompt_logprobs = answer.group.started[prompt].prompt_logprobs
        alternatives = answer.body.logprobs
        self._logprobs = None if alternatives is None else CompletionLogprobs(alternatives)

    @property
    def prompt(self) -> str:
        """The text that the choice begins with: the prompt's, where it is echoed."""
        return self._echo.text if self._echo else ""

    def first(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any] | None:
        """Return the `logprobs` object of the echoed prompt and of the first tokens after it."""
        if self._logprobs is None or self._echo is None:
            return self.more(positions)
        opening = self._logprobs.of_prompt(self._echo.first_token, self._prompt_logprobs)
        return joined([opening, self._logprobs.of(positions)])

    def more(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any] | None:
        """Return the `logprobs` object of the tokens that follow; None where none was asked for."""
        return None if self._logprobs is None else self._logprobs.of(positions)


def _frame(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.body.model,
        "system_fingerprint": answer.group.fingerprint,
    }


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, end: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": end}
