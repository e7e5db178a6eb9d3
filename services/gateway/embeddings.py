"""`POST /v1/embeddings`: the mean of the last hidden states, of the base or an adapter.

A vector is the mean, over an input's tokens, of the hidden states behind the last layer and its norm; it is
not normalised to length 1.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, ClassVar, Literal

import grpc
import numpy as np
from fastapi import APIRouter, Depends
from pydantic import Field, StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorafleet.inference.v1.inference_service_pb2 import EmbedRequest, EmbedResponse
from services.gateway.auth import principal_of, requires
from services.gateway.disconnect import while_connected
from services.gateway.errors import from_upstream
from services.gateway.json_body import Body, json_body
from services.gateway.keys import Scope
from services.gateway.metering import Charge, about_tokens
from services.gateway.model_choice import chosen_model
from services.gateway.state import Gateway, gateway_of
from services.gateway.upstream_fields import in_http_terms
from services.gateway.usage import Counts

router = APIRouter(dependencies=[Depends(requires(Scope.INFERENCE))])

MAX_INPUTS = 256
FIELDS = {"model.adapter": "model", "adapter": "model", "ref": "model", "inputs": "input"}

Text = Annotated[str, StringConstraints(min_length=1)]


class EmbeddingRequest(Body):
    """One or several texts. A vector is as long as the base's hidden size, so `dimensions` is refused.

    Token ids are refused too: they are another tokenizer's in clients that cut texts by themselves.
    """

    unsupported: ClassVar[frozenset[str]] = frozenset({"dimensions"})

    model: str | None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    user: Annotated[str, StringConstraints(max_length=1024)] | None = None

    @property
    def inputs(self) -> list[str]:
        """The texts, one by one."""
        return [self.input] if isinstance(self.input, str) else self.input


@router.post("/v1/embeddings")
async def create_embeddings(
    request: Request, body: Annotated[EmbeddingRequest, Depends(json_body(EmbeddingRequest))]
) -> Response:
    """Return a vector for each text."""
    gateway, principal = gateway_of(request), principal_of(request)
    text_bytes = sum(len(text.encode()) for text in body.inputs)
    charge = await gateway.meter.charge(principal, about_tokens(text_bytes=text_bytes, limit=0))
    answer = await while_connected(request, _embed(gateway, principal.tenant, body, charge))
    encode = _as_base64 if body.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(item.values)}
        for index, item in enumerate(answer.embeddings)
    ]
    tokens = answer.usage.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    content = {"object": "list", "data": data, "model": body.model, "usage": usage}
    return JSONResponse(content, headers=charge.headers)


async def _embed(gateway: Gateway, tenant: str, body: EmbeddingRequest, charge: Charge) -> EmbedResponse:
    counts, adapter = Counts(), ""
    try:
        model = await chosen_model(gateway, tenant, body.model, requests=1)
        adapter = model.adapter.partition("@")[0].partition(":")[0]
        answer = await gateway.upstream.inference.Embed(EmbedRequest(model=model, inputs=body.inputs))
        counts.prompt_tokens = answer.usage.prompt_tokens
        return answer
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), FIELDS) from error
    finally:
        charge.settle(counts, adapter)


def _as_base64(values: Any) -> str:
    """Return numbers as OpenAI's SDKs ask for them: little-endian float32."""
    return base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode("ascii")
