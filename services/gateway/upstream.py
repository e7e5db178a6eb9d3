"""Channels and stubs to the three services."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceStub
from lorafleet.registry.v1.file_pb2_grpc import FileServiceStub
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceStub
from services.common.channels import open_channel
from services.gateway.config import GatewaySettings

HEALTH_TIMEOUT_SECONDS = 2.0

ADAPTER_SERVICE = "lorafleet.registry.v1.AdapterService"
BASE_MODEL_SERVICE = "lorafleet.registry.v1.BaseModelService"
FILE_SERVICE = "lorafleet.registry.v1.FileService"
TRAINER_SERVICE = "lorafleet.trainer.v1.TrainerService"
INFERENCE_SERVICE = "lorafleet.inference.v1.InferenceService"

# Reads, which may be sent again. A generation is never among them.
_REGISTRY_READS = [
    f"{ADAPTER_SERVICE}/{method}"
    for method in (
        "GetAdapter",
        "ListAdapters",
        "ResolveVersion",
        "ListVersions",
        "ListAliases",
        "ListAliasHistory",
    )
]
_REGISTRY_READS += [f"{FILE_SERVICE}/{method}" for method in ("GetFile", "ListFiles")]
_REGISTRY_READS += [f"{BASE_MODEL_SERVICE}/GetBaseModel"]
_TRAINER_READS = [
    f"{TRAINER_SERVICE}/{method}" for method in ("GetJob", "ListJobs", "ListEvents", "ListCheckpoints")
]
_INFERENCE_READS = [
    f"{INFERENCE_SERVICE}/{method}" for method in ("Tokenize", "Detokenize", "ListResident", "GetStatus")
]


class Upstream:
    """The stubs of the registry, the trainer and inference, over one channel each."""

    def __init__(self, settings: GatewaySettings) -> None:
        seconds, tls = settings.unary_timeout_seconds, settings.peer_tls
        registry = open_channel(
            settings.registry_target,
            idempotent_methods=_REGISTRY_READS,
            unary_timeout_seconds=seconds,
            tls=tls,
        )
        trainer = open_channel(
            settings.trainer_target, idempotent_methods=_TRAINER_READS, unary_timeout_seconds=seconds, tls=tls
        )
        inference = open_channel(
            settings.inference_target,
            idempotent_methods=_INFERENCE_READS,
            unary_timeout_seconds=seconds,
            tls=tls,
        )
        self.adapters = AdapterServiceStub(registry)
        self.bases = BaseModelServiceStub(registry)
        self.files = FileServiceStub(registry)
        self.trainer = TrainerServiceStub(trainer)
        self.inference = InferenceServiceStub(inference)
        self._channels = {
            ADAPTER_SERVICE: registry,
            BASE_MODEL_SERVICE: registry,
            FILE_SERVICE: registry,
            TRAINER_SERVICE: trainer,
            INFERENCE_SERVICE: inference,
        }

    def channel(self, service: str) -> grpc.aio.Channel:
        """Return the channel to the service of this full name."""
        return self._channels[service]

    async def health(self) -> dict[str, str]:
        """Return the health of each service: `serving`, `not_serving` or `unreachable`."""
        names = [ADAPTER_SERVICE, TRAINER_SERVICE, INFERENCE_SERVICE]
        states = await asyncio.gather(*(self._state(name) for name in names))
        return {name.split(".")[1]: state for name, state in zip(names, states, strict=True)}

    async def close(self) -> None:
        """Close the channels; calls still running end at once."""
        for channel in set(self._channels.values()):
            await channel.close(None)

    async def _state(self, service: str) -> str:
        stub = health_pb2_grpc.HealthStub(self._channels[service])
        try:
            answer = await stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=HEALTH_TIMEOUT_SECONDS
            )
        except grpc.RpcError:
            return "unreachable"
        return "serving" if answer.status == health_pb2.HealthCheckResponse.SERVING else "not_serving"
