"""From the `model` of a request to what inference is asked for."""

from __future__ import annotations

import grpc

from lorafleet.inference.v1.generation_pb2 import ModelRef
from lorafleet.registry.v1.adapter_pb2 import ResolveVersionRequest
from services.gateway.errors import from_upstream
from services.gateway.model_names import parse_model_name
from services.gateway.state import Gateway
from services.gateway.upstream_fields import in_http_terms


async def chosen_model(gateway: Gateway, tenant: str, text: str | None, *, requests: int) -> ModelRef:
    """Return the reference for inference.

    Inference resolves a name when it admits a request. Where one HTTP request becomes several, the name is
    resolved here first, so that an alias that moves meanwhile cannot split the answer over two versions.

    Raises:
        NotFound: `model_not_found`.
    """
    base = await gateway.served_base.identity()
    name = parse_model_name(text, base=base.name, tenant=tenant)
    if name.adapter is None or requests == 1:
        return name.reference()
    try:
        version = await gateway.upstream.adapters.ResolveVersion(ResolveVersionRequest(ref=str(name.adapter)))
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error)) from error
    return ModelRef(adapter=f"{version.adapter}@{version.digest}")
