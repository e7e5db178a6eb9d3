"""Channels and stubs to the three services."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceStub
from lorafleet.registry.v1.file_pb2_grpc import FileServiceStub
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceStub
from services.common.channels import open_channel
from services.common.index_connection import open_index
from services.gateway.config import GatewaySettings
from services.gateway.routing.affinity import AdapterAffinity
from services.gateway.routing.channel import RoutedChannel
from services.gateway.routing.fleet import Fleet
from services.gateway.routing.hints import DigestHints
from services.gateway.routing.presence import PresenceReader
from services.gateway.routing.router import Router

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
    """The stubs of the registry, the trainer and inference, whose calls go to one replica or another."""

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
        self._fleet = _inference_fleet(settings)
        self.adapters = AdapterServiceStub(registry)
        router = Router(self._fleet, AdapterAffinity(), patience_seconds=settings.replica_wait_seconds)
        routed = RoutedChannel(router, DigestHints(self.adapters))
        # It makes the calls that the contract of inference has, and nothing else of a channel.
        inference = cast(grpc.aio.Channel, routed)
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
        self._hearing = asyncio.create_task(self._fleet.run(), name="inference replicas")

    def channel(self, service: str) -> grpc.aio.Channel:
        """Return the channel to the service of this full name."""
        return self._channels[service]

    async def health(self) -> dict[str, str]:
        """Return the health of each service: `serving`, `not_serving` or `unreachable`.

        Inference serves as long as one replica does.
        """
        channels = {
            ADAPTER_SERVICE: [self._channels[ADAPTER_SERVICE]],
            TRAINER_SERVICE: [self._channels[TRAINER_SERVICE]],
            INFERENCE_SERVICE: [replica.channel for replica in self._fleet.replicas],
        }
        states = await asyncio.gather(*(_state(name, found) for name, found in channels.items()))
        return {name.split(".")[1]: state for name, state in zip(channels, states, strict=True)}

    async def close(self) -> None:
        """Close the channels; calls still running end at once."""
        self._hearing.cancel()
        with suppress(asyncio.CancelledError):
            await self._hearing
        await self._fleet.close()
        for service in (ADAPTER_SERVICE, TRAINER_SERVICE):
            await self._channels[service].close(None)


def _inference_fleet(settings: GatewaySettings) -> Fleet:
    """Return the replicas of the settings; those of Redis join where the settings name their base."""

    def open_to(target: str) -> grpc.aio.Channel:
        return open_channel(
            target,
            idempotent_methods=_INFERENCE_READS,
            unary_timeout_seconds=settings.unary_timeout_seconds,
            tls=settings.peer_tls,
        )

    return Fleet(
        settings.inference_targets,
        open_to,
        base=settings.inference_base,
        presence=PresenceReader(open_index(settings.redis_url)) if settings.redis_url is not None else None,
        linger_seconds=settings.stream_timeout_seconds,
    )


async def _state(service: str, channels: Iterable[grpc.aio.Channel]) -> str:
    """Return the best state of those that offer a service."""
    states = await asyncio.gather(*(_state_of_one(service, channel) for channel in channels))
    return next((word for word in ("serving", "not_serving") if word in states), "unreachable")


async def _state_of_one(service: str, channel: grpc.aio.Channel) -> str:
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await stub.Check(
            health_pb2.HealthCheckRequest(service=service), timeout=HEALTH_TIMEOUT_SECONDS
        )
    except grpc.RpcError:
        return "unreachable"
    return "serving" if answer.status == health_pb2.HealthCheckResponse.SERVING else "not_serving"
