"""The base model that answers here, as inference tells it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.inference.v1.inference_service_pb2 import GetStatusRequest

if TYPE_CHECKING:
    from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceAsyncStub

CACHE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Name and fingerprint of a base."""

    name: str
    fingerprint_digest: str


class ServedBase:
    """Knows which base inference serves; asks again every `CACHE_SECONDS`."""

    def __init__(self, inference: InferenceServiceAsyncStub) -> None:
        self._inference = inference
        self._known: BaseIdentity | None = None
        self._asked_at = 0.0

    async def identity(self) -> BaseIdentity:
        """Return the base that is served now; raise `grpc.RpcError` where inference does not answer."""
        if self._known is None or time.monotonic() - self._asked_at > CACHE_SECONDS:
            status = await self._inference.GetStatus(GetStatusRequest())
            self._known = BaseIdentity(
                name=status.base_model, fingerprint_digest=status.base_fingerprint_digest
            )
            self._asked_at = time.monotonic()
        return self._known
