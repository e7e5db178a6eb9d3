"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorafleet.inference.v1.generation_pb2 import Delta, GenerateRequest, PositionLogprobs
from services.common.ids import new_id
from services.gateway.auth import principal_of, requires
from services.gateway.chat_request import ChatRequest
from services.gateway.disconnect import while_connected
from services.gateway.generation import GenerationGroup, TokenCounts, admit, collect, finish_reason
from services.gateway.json_body import json_body
from services.gateway.keys import Principal, Scope
from services.gateway.logprobs import chat_logprobs
from services.gateway.model_choice import chosen_model
from services.gateway.sampling import sampling_params
from services.gateway.sse import EventStream
from services.gateway.state import Gateway, gateway_of
from services.gateway.tools import Call, HeldText, Tool, read_call
from services.gateway.upstream_fields import CHAT_FIELDS

_TOOL_CALLS = "tool_calls"

router = APIRouter(dependencies=[Depends(requires(Scope.INFERENCE))])


@dataclass(frozen=True, slots=True)
class Answer:
    """An admitted request: what was asked, and what answers."""

    body: ChatRequest
    id: str
    created: int
    group: GenerationGroup

    def frame(self, kind: str) -> dict[str, Any]:
        """Return what every object of this answer has in common."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.group.fingerprint,
        }

    def logprobs(self, positions: Sequence[PositionLogprobs]) -> dict[str, Any] | None:
        """Return the `logprobs` object of a choice, or None where it was not asked for."""
        return None if self.body.alternatives is None else chat_logprobs(positions)


@router.post("/v1/chat/completions")
async def create_chat_completion(
    request: Request, body: Annotated[ChatRequest, Depends(json_body(ChatRequest))]
) -> Response:
    """Answer a conversation `n` times; as one object or, with `stream`, as events."""
    gateway = gateway_of(request)
    if body.stream:
        answer = await while_connected(request, _admit(gateway, principal_of(request), body))
        group = answer.group
        return EventStream(
            _chunks(answer), on_close=group.cancel, check=request.state.key_check, headers=group.headers
        )
    return await while_connected(request, _whole(gateway, principal_of(request), body))


async def _whole(gateway: Gateway, principal: Principal, body: ChatRequest) -> Response:
    answer = await _admit(gateway, principal, body)
    collected, counts = await collect(answer.group, body.completions)
    choices = [
        {
            "index": index,
            **_message("".join(completion.text), completion.finish_reason, body.callable_tools),
            "logprobs": answer.logprobs(completion.logprobs),
        }
        for index, completion in enumerate(collected)
    ]
    return JSONResponse(
        {**answer.frame("chat.completion"), "choices": choices, "usage": counts.object()},
        headers=answer.group.headers,
    )


async def _chunks(answer: Answer) -> AsyncGenerator[dict[str, Any]]:
    """Yield the stream's objects: a role for each choice, the deltas, the ends, the counts."""
    body, counts = answer.body, TokenCounts()
    usage: dict[str, Any] = {"usage": None} if body.wants_usage_in_stream else {}
    frame = {**answer.frame("chat.completion.chunk"), **usage}
    for index in range(body.completions):
        yield {**frame, "choices": [_choice(index, {"role": "assistant", "content": "", "refusal": None})]}
    held = [HeldText() for _ in range(body.completions)]
    async with aclosing(answer.group.events()) as events:
        async for prompt, item in events:
            if isinstance(item, Delta):
                text = held[item.index].push(item.text) if body.callable_tools else item.text
                if text or item.logprobs:
                    logprobs = answer.logprobs(item.logprobs)
                    yield {**frame, "choices": [_choice(item.index, {"content": text}, logprobs)]}
            else:
                counts.add(prompt, item.usage)
                end = finish_reason(item)
                rest = held[item.index].end(body.callable_tools)
                if isinstance(rest, Call):
                    end = _TOOL_CALLS
                    delta = {"tool_calls": [{"index": 0, **rest.as_object()}]}
                    yield {**frame, "choices": [_choice(item.index, delta)]}
                elif rest:
                    yield {**frame, "choices": [_choice(item.index, {"content": rest})]}
                yield {**frame, "choices": [_choice(item.index, {}, end=end)]}
    if usage:
        yield {**frame, "choices": [], "usage": counts.object()}


async def _admit(gateway: Gateway, principal: Principal, body: ChatRequest) -> Answer:
    generate = GenerateRequest(
        model=await chosen_model(gateway, principal.tenant, body.model, requests=1),
        chat=body.prompt(),
        sampling=sampling_params(
            body,
            max_tokens=body.completion_limit,
            logprobs=body.alternatives,
            json_schema=body.json_schema,
        ),
    )
    group = await admit(
        gateway.upstream.inference,
        [generate],
        completions=body.completions,
        timeout_seconds=gateway.settings.stream_timeout_seconds,
        fields=CHAT_FIELDS,
        charge=await gateway.meter.charge(principal, body.about_tokens),
    )
    return Answer(body, new_id("chatcmpl"), int(time.time()), group)


def _message(text: str, end: str, tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the `message` and `finish_reason` of a choice, which is text or a call of one of `tools`."""
    call = read_call(text, tools) if tools else None
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if call is None:
        return {"message": message, "finish_reason": end}
    return {
        "message": message | {"content": None, "tool_calls": [call.as_object()]},
        "finish_reason": _TOOL_CALLS,
    }


def _choice(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, *, end: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
