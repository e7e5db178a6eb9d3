"""What the fake services share: one base, known to the registry that is faked."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.registry.v1 import base_model_pb2 as bases
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceServicer

BASE = "tiny-base"
FINGERPRINT = "sha256:" + "b" * 64
BASE_CREATED = 1_700_000_000

Context = grpc.aio.ServicerContext[Any, Any]


def now() -> Timestamp:
    """The present, in whole seconds."""
    return Timestamp(seconds=int(time.time()))


def digest_of(*parts: object) -> str:
    """A digest over the texts of `parts`."""
    return "sha256:" + hashlib.sha256(repr(parts).encode()).hexdigest()


class FakeBases(BaseModelServiceServicer):
    """The one base that is registered."""

    async def GetBaseModel(self, request: bases.GetBaseModelRequest, context: Context) -> bases.BaseModel:
        assert request.name == BASE
        quantization = bases.Quantization(compute_dtype="bfloat16")
        return bases.BaseModel(
            name=BASE,
            create_time=Timestamp(seconds=BASE_CREATED),
            fingerprint=bases.Fingerprint(digest=FINGERPRINT, quantization=quantization),
        )
