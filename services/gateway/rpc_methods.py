"""Which gRPC methods of the services behind the gateway are public, and what a key needs for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.descriptor import FileDescriptor, MethodDescriptor

from lorafleet.inference.v1 import inference_service_pb2
from lorafleet.registry.v1 import adapter_pb2, base_model_pb2, file_pb2
from lorafleet.trainer.v1 import trainer_service_pb2
from services.gateway.keys import Scope

_FILES: tuple[FileDescriptor, ...] = (
    adapter_pb2.DESCRIPTOR,
    base_model_pb2.DESCRIPTOR,
    file_pb2.DESCRIPTOR,
    inference_service_pb2.DESCRIPTOR,
    trainer_service_pb2.DESCRIPTOR,
)

_SCOPES: dict[str, Scope | None] = {
    "lorafleet.registry.v1.AdapterService": Scope.ADAPTERS,
    "lorafleet.registry.v1.BaseModelService": None,
    "lorafleet.registry.v1.FileService": Scope.FILES,
    "lorafleet.inference.v1.InferenceService": Scope.INFERENCE,
    "lorafleet.trainer.v1.TrainerService": Scope.FINE_TUNING,
}

# What touches everybody's memory or names is the operator's.
_OPERATE = frozenset(
    {
        "lorafleet.registry.v1.BaseModelService/CreateBaseModel",
        "lorafleet.inference.v1.InferenceService/Evict",
        "lorafleet.inference.v1.InferenceService/Pin",
        "lorafleet.inference.v1.InferenceService/Unpin",
    }
)

# Between our own services alone: whoever holds a lease keeps a version's bytes from being collected.
_PRIVATE = frozenset(
    {
        "lorafleet.registry.v1.AdapterService/AcquireLease",
        "lorafleet.registry.v1.AdapterService/ReleaseLease",
    }
)


@dataclass(frozen=True, slots=True)
class PublicMethod:
    """One method that clients may call.

    Attributes:
        service: full name of its service.
        scope: what a key needs for it; None: any valid key.
    """

    service: str
    name: str
    scope: Scope | None
    streams_requests: bool
    streams_responses: bool

    @property
    def path(self) -> str:
        """The method as it is called, `/package.Service/Method`."""
        return f"/{self.service}/{self.name}"


def public_methods() -> tuple[PublicMethod, ...]:
    """Return every public method of the contract."""
    return tuple(
        _public(method)
        for method in _methods()
        if f"{method.containing_service.full_name}/{method.name}" not in _PRIVATE
    )


def _methods() -> Iterator[MethodDescriptor]:
    for file in _FILES:
        for service in file.services_by_name.values():
            yield from service.methods


def _public(method: MethodDescriptor) -> PublicMethod:
    service = method.containing_service.full_name
    is_operation = f"{service}/{method.name}" in _OPERATE
    return PublicMethod(
        service=service,
        name=method.name,
        scope=Scope.OPERATE if is_operation else _SCOPES[service],
        streams_requests=method.client_streaming,
        streams_responses=method.server_streaming,
    )
