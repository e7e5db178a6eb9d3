"""`POST /v1/adapters/compare`: one prompt to several models, their greedy answers side by side."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field, StringConstraints, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorafleet.inference.v1.generation_pb2 import ChatPrompt, GenerateRequest, ModelRef, SamplingParams
from services.gateway.auth import principal_of, requires
from services.gateway.chat_request import MAX_MESSAGES, Message
from services.gateway.disconnect import while_connected
from services.gateway.generation import admit, collect
from services.gateway.json_body import Body, field_error, json_body
from services.gateway.keys import Principal, Scope
from services.gateway.logprobs import finite
from services.gateway.metering import about_tokens
from services.gateway.model_choice import chosen_model
from services.gateway.sampling import MaxTokens
from services.gateway.state import Gateway, gateway_of
from services.gateway.upstream_fields import CHAT_FIELDS, COMPLETION_FIELDS

router = APIRouter(prefix="/v1/adapters", dependencies=[Depends(requires(Scope.INFERENCE))])

MAX_MODELS = 16
_DEFAULT_MAX_TOKENS = 128


class Comparison(Body):
    """What all of the models are asked: a text to go on with, or a conversation."""

    models: Annotated[list[str], Field(min_length=1, max_length=MAX_MODELS)]
    prompt: Annotated[str, StringConstraints(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    max_tokens: MaxTokens = _DEFAULT_MAX_TOKENS

    @model_validator(mode="after")
    def _check_prompt(self) -> Comparison:
        if (self.prompt is None) == (self.messages is None):
            raise field_error("prompt", "either prompt or messages must be given")
        return self

    @property
    def about_tokens(self) -> int:
        """About how many tokens one answer will use."""
        texts = [self.prompt or "", *(message.text for message in self.messages or ())]
        return about_tokens(text_bytes=sum(len(text.encode()) for text in texts), limit=self.max_tokens)

    def request_to(self, model: ModelRef) -> GenerateRequest:
        """Return what one model is asked."""
        sampling = SamplingParams(temperature=0, max_tokens=self.max_tokens, logprobs=0)
        if self.prompt is not None:
            return GenerateRequest(model=model, text=self.prompt, sampling=sampling)
        messages = [message.message() for message in self.messages or ()]
        return GenerateRequest(model=model, chat=ChatPrompt(messages=messages), sampling=sampling)


@router.post("/compare")
async def compare(request: Request, body: Annotated[Comparison, Depends(json_body(Comparison))]) -> Response:
    """Ask each model once, greedily; `mean_logprob` tells how sure each is of its own answer."""
    return await while_connected(request, _compare(gateway_of(request), principal_of(request), body))


async def _compare(gateway: Gateway, principal: Principal, body: Comparison) -> Response:
    # All names first: one that is unknown ends the comparison before anything was generated.
    models = [
        await chosen_model(gateway, principal.tenant, name, requests=len(body.models)) for name in body.models
    ]
    waiting = [
        asyncio.create_task(_answer(gateway, principal, body, name, model))
        for name, model in zip(body.models, models, strict=True)
    ]
    try:
        answers = await asyncio.gather(*waiting)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return JSONResponse({"object": "list", "data": answers})


async def _answer(
    gateway: Gateway, principal: Principal, body: Comparison, name: str, model: ModelRef
) -> dict[str, Any]:
    group = await admit(
        gateway.upstream.inference,
        [body.request_to(model)],
        completions=1,
        timeout_seconds=gateway.settings.stream_timeout_seconds,
        fields=COMPLETION_FIELDS if body.messages is None else CHAT_FIELDS,
        charge=await gateway.meter.charge(principal, body.about_tokens),
    )
    (choice,), counts = await collect(group, 1)
    logprobs = [finite(position.chosen.logprob) for position in choice.logprobs]
    started = group.started[0]
    return {
        "object": "comparison.answer",
        "model": name,
        "version": started.version_ref or None,
        "digest": started.version_digest or None,
        "text": "".join(choice.text),
        "finish_reason": choice.finish_reason,
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "usage": counts.object(),
    }
