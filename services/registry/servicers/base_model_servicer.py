"""BaseModelService."""

from __future__ import annotations

from typing import Any

import grpc

from lorafleet.registry.v1 import base_model_pb2, base_model_pb2_grpc
from services.common.errors import InvalidArgument
from services.registry import convert, paging
from services.registry.bases import Bases
from services.registry.clock import now_ms
from services.registry.token_secret import TokenSource


class BaseModelServicer(base_model_pb2_grpc.BaseModelServiceServicer):
    """Registers and finds bases; they are shared by all tenants."""

    def __init__(self, bases: Bases, tokens: TokenSource) -> None:
        self._bases = bases
        self._tokens = tokens

    async def CreateBaseModel(  # noqa: N802
        self, request: base_model_pb2.CreateBaseModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> base_model_pb2.BaseModel:
        """See base_model.proto."""
        base = convert.base_from_message(request.base_model, create_time_ms=now_ms())
        return convert.base_to_message(await self._bases.create(base))

    async def GetBaseModel(  # noqa: N802
        self, request: base_model_pb2.GetBaseModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> base_model_pb2.BaseModel:
        """See base_model.proto."""
        match request.WhichOneof("key"):
            case "name":
                base = await self._bases.by_name(request.name)
            case "digest":
                base = await self._bases.by_digest(request.digest)
            case _:
                raise InvalidArgument("missing_field", "Give a name or a digest.", field="key")
        return convert.base_to_message(base)

    async def ListBaseModels(  # noqa: N802
        self, request: base_model_pb2.ListBaseModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> base_model_pb2.ListBaseModelsResponse:
        """See base_model.proto."""
        size = paging.page_size(request.page_size)
        tokens = await self._tokens.get()
        bases, more = await self._bases.page(tokens.position(request.page_token, "bases"), size)
        return base_model_pb2.ListBaseModelsResponse(
            base_models=[convert.base_to_message(base) for base in bases],
            next_page_token=tokens.after(bases[-1].name, "bases") if more else "",
        )
