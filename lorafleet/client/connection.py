"""One channel to a fleet's gRPC door, and the key that every call shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from services.common.channels import open_channel
from services.common.status import from_rpc_error
from services.common.tls import PeerTls

# Reads, which are sent again where a fleet is away for a moment.
_REGISTRY = "lorafleet.registry.v1"
_IDEMPOTENT = (
    *(
        f"{_REGISTRY}.AdapterService/{name}"
        for name in (
            "GetAdapter",
            "ListAdapters",
            "ListVersions",
            "ResolveVersion",
            "ListAliases",
            "ListAliasHistory",
        )
    ),
    f"{_REGISTRY}.BaseModelService/GetBaseModel",
    f"{_REGISTRY}.FileService/GetFile",
    f"{_REGISTRY}.FileService/ListFiles",
    *(f"lorafleet.trainer.v1.TrainerService/{name}" for name in ("GetJob", "ListJobs", "ListCheckpoints")),
    *(
        f"lorafleet.inference.v1.InferenceService/{name}"
        for name in ("Tokenize", "Detokenize", "GetStatus", "ListResident", "Score", "Embed")
    ),
)

AnswerT = TypeVar("AnswerT", bound=Message)


class Connection:
    """Makes calls; their errors come as `services.common.errors.LorafleetError`."""

    def __init__(self, target: str, api_key: str, *, ca_file: Path | None = None) -> None:
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self.channel = open_channel(
            target, idempotent_methods=_IDEMPOTENT, tls=None if ca_file is None else PeerTls(ca_file)
        )

    async def call(self, method: Any, request: Any, answer: type[AnswerT]) -> AnswerT:
        """Return the answer of a method that answers once by a message of type `answer`.

        Raises:
            LorafleetError: what the fleet refused, or why it could not be reached.
        """
        try:
            message = await method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        assert isinstance(message, answer), "the stub reads the type that the contract names"
        return message

    async def pages(self, method: Any, request: Any, answer: type[AnswerT]) -> AsyncIterator[AnswerT]:
        """Yield the answers of a list method, page after page; `request` is the one for the first."""
        while True:
            page: Any = await self.call(method, request, answer)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def stream(self, method: Any, request: Any) -> AsyncIterator[Any]:
        """Yield the messages of a method that answers by a stream; leaving early ends the call."""
        call = method(request, metadata=self._metadata)
        try:
            async for message in call:
                yield message
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()
