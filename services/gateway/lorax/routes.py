"""LoRAX's routes, for clients written for that server; keys, limits and counts are those of `/v1`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorafleet.inference.v1.generation_pb2 import Delta, GenerateRequest
from lorafleet.inference.v1.inference_service_pb2 import GetStatusRequest, TokenizeRequest
from lorafleet.registry.v1.base_model_pb2 import GetBaseModelRequest
from services.common.errors import Internal
from services.gateway.auth import principal_of, requires
from services.gateway.disconnect import while_connected
from services.gateway.generation import GenerationGroup, admit
from services.gateway.json_body import json_body
from services.gateway.keys import Principal, Scope
from services.gateway.logprobs import token_text
from services.gateway.lorax.answer import Answer, Token, split, token_object
from services.gateway.lorax.errors import LoraxRoute, lorax_error
from services.gateway.lorax.request import CompatBody, GenerateBody, StreamBody, TokenizeBody
from services.gateway.model_choice import chosen_model
from services.gateway.sampling import MAX_COMPLETIONS, MAX_STOPS
from services.gateway.sse import Dialect, EventStream
from services.gateway.state import Gateway, gateway_of
from services.gateway.upstream_fields import LORAX_FIELDS

router = APIRouter(dependencies=[Depends(requires(Scope.INFERENCE))], route_class=LoraxRoute)

_DIALECT = Dialect(b"", lorax_error)


@router.post("/generate")
async def generate(
    request: Request, body: Annotated[GenerateBody, Depends(json_body(GenerateBody))]
) -> Response:
    """Go on with a text; with `details` also the tokens."""
    answer, headers = await _whole(request, body)
    return JSONResponse(answer, headers=headers)


@router.post("/generate_stream")
async def generate_stream(
    request: Request, body: Annotated[StreamBody, Depends(json_body(StreamBody))]
) -> Response:
    """Go on with a text, one event per token; the last one has the whole text."""
    return await _streamed(request, body)


@router.post("/")
async def generate_either_way(
    request: Request, body: Annotated[CompatBody, Depends(json_body(CompatBody))]
) -> Response:
    """As `/generate`, in a list of one, or with `stream` as `/generate_stream`: what LoRAX's client uses."""
    if body.stream:
        return await _streamed(request, body)
    answer, headers = await _whole(request, body)
    return JSONResponse([answer], headers=headers)


@router.post("/tokenize")
async def tokenize(
    request: Request, body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))]
) -> list[dict[str, Any]]:
    """Return the tokens of a text as a prompt, with their place in it."""
    inference = gateway_of(request).upstream.inference
    answer = await inference.Tokenize(TokenizeRequest(text=body.inputs))
    return split(body.inputs, answer.token_ids, answer.tokens)


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """Return what is served, and the limits of a request."""
    upstream = gateway_of(request).upstream
    status = await upstream.inference.GetStatus(GetStatusRequest())
    base = await upstream.bases.GetBaseModel(GetBaseModelRequest(name=status.base_model))
    return {
        "model_id": status.base_model,
        "model_sha": status.base_fingerprint_digest.removeprefix("sha256:"),
        "model_dtype": f"torch.{base.fingerprint.quantization.compute_dtype}",
        "model_device_type": status.device,
        "model_pipeline_tag": "text-generation",
        "max_best_of": MAX_COMPLETIONS,
        "max_stop_sequences": MAX_STOPS,
        "max_input_length": status.max_model_len - 1,
        "max_total_tokens": status.max_model_len,
        "version": version("lorafleet"),
        "sha": None,
        "docker_label": None,
    }


async def _whole(request: Request, body: GenerateBody) -> tuple[dict[str, Any], dict[str, str]]:
    """Return LoRAX's answer object and the headers of its answer."""
    return await while_connected(request, _answer(gateway_of(request), principal_of(request), body))


async def _answer(
    gateway: Gateway, principal: Principal, body: GenerateBody
) -> tuple[dict[str, Any], dict[str, str]]:
    options = body.options
    wants_details = bool(options.details or options.decoder_input_details)
    group = await _admit(gateway, principal, body, logprobs=wants_details or options.completions > 1)
    prefill = await _prefill(gateway, group, body) if options.decoder_input_details else []
    answers = [Answer() for _ in range(options.completions)]
    async with aclosing(group.events()) as events:
        async for _, item in events:
            if isinstance(item, Delta):
                answers[item.index].add(item)
            else:
                answers[item.index].finish(item)
    best, *others = sorted(answers, key=lambda answer: answer.mean_logprob, reverse=True)
    shown: dict[str, Any] = {"generated_text": _text(body, best)}
    if wants_details:
        shown["details"] = {**_details(best, prefill, body), "skipped_tokens": 0}
        if others:
            shown["details"]["best_of_sequences"] = [
                {"generated_text": _text(body, other), **_details(other, prefill, body)} for other in others
            ]
    return shown, group.headers


async def _streamed(request: Request, body: GenerateBody) -> Response:
    gateway, principal = gateway_of(request), principal_of(request)
    group = await while_connected(request, _admit(gateway, principal, body, logprobs=True))
    return EventStream(
        _tokens(group, body),
        on_close=group.cancel,
        check=request.state.key_check,
        headers=group.headers,
        dialect=_DIALECT,
    )


async def _tokens(group: GenerationGroup, body: GenerateBody) -> AsyncGenerator[dict[str, Any]]:
    """Yield an object per token. The last one tells of the end, so each waits until the next has come."""
    answer = Answer()
    held: Token | None = None
    async with aclosing(group.events()) as events:
        async for _, item in events:
            if isinstance(item, Delta):
                for token in answer.add(item):
                    if held is not None:
                        yield _event(held, body)
                    held = token
            else:
                answer.finish(item)
    if held is None:
        raise Internal("incomplete_answer", "inference ended the answer without a token")
    details = answer.details(body.options.drawn_seed)
    yield {**_event(held, body), "generated_text": _text(body, answer), "details": details}


async def _admit(
    gateway: Gateway, principal: Principal, body: GenerateBody, *, logprobs: bool
) -> GenerationGroup:
    options = body.options
    name = options.adapter_id
    if name is None:
        name = (await gateway.served_base.identity()).name
    generate = GenerateRequest(
        model=await chosen_model(gateway, principal.tenant, name, requests=1),
        text=body.inputs,
        sampling=options.sampling(logprobs=logprobs),
    )
    return await admit(
        gateway.upstream.inference,
        [generate],
        completions=options.completions,
        timeout_seconds=gateway.settings.stream_timeout_seconds,
        fields=LORAX_FIELDS,
        charge=await gateway.meter.charge(principal, body.about_tokens),
    )


async def _prefill(gateway: Gateway, group: GenerationGroup, body: GenerateBody) -> list[dict[str, Any]]:
    """Return the prompt's tokens; the first has no log-probability."""
    try:
        prompt = await gateway.upstream.inference.Tokenize(TokenizeRequest(text=body.inputs))
    except BaseException:
        group.cancel()
        raise
    first = {"id": prompt.token_ids[0], "text": token_text(prompt.tokens[0]), "logprob": None}
    return [first, *(token_object(position.chosen) for position in group.started[0].prompt_logprobs)]


def _text(body: GenerateBody, answer: Answer) -> str:
    return (body.inputs if body.options.return_full_text else "") + answer.text


def _details(answer: Answer, prefill: list[dict[str, Any]], body: GenerateBody) -> dict[str, Any]:
    options = body.options
    # The answers of one request share its seed, which gives none of them alone again.
    seed = options.drawn_seed if options.completions == 1 else None
    return {
        **answer.details(seed),
        "prefill": prefill,
        "tokens": answer.token_objects(options.return_k_alternatives),
    }


def _event(token: Token, body: GenerateBody) -> dict[str, Any]:
    shown = token.object(body.options.return_k_alternatives)
    return {"token": shown, "generated_text": None, "details": None}
