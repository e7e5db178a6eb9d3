"""A client that knows nothing of a service but its address: every message type comes by reflection."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import grpc
from google.protobuf import descriptor, descriptor_pool, message_factory
from google.protobuf.message import Message
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

Metadata = tuple[tuple[str, str], ...]


class ReflectionClient:
    """Calls methods by their names. It blocks, so an asyncio server's own thread must not use it."""

    def __init__(self, address: str, metadata: Metadata = ()) -> None:
        self._channel = grpc.insecure_channel(address)
        self._metadata = metadata
        database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = descriptor_pool.DescriptorPool(database)

    def __enter__(self) -> ReflectionClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def message(self, full_name: str, **fields: Any) -> Message:
        """Return a message of a type of the server's."""
        return _class(self._pool.FindMessageTypeByName(full_name))(**fields)

    def call(self, full_name: str, request: Message | Iterable[Message]) -> Any:
        """Call `package.Service.Method`; return its message, or the list of them where it streams."""
        service, _, name = full_name.rpartition(".")
        method = self._pool.FindServiceByName(service).methods_by_name[name]
        answer = self._stub(method)(
            iter(request) if isinstance(request, Iterable) else request,
            metadata=self._metadata,
            timeout=30,
        )
        return list(answer) if method.server_streaming else answer

    def _stub(self, method: descriptor.MethodDescriptor) -> Any:
        kinds = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
            (True, True): self._channel.stream_stream,
        }
        return kinds[method.client_streaming, method.server_streaming](
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=_class(method.input_type).SerializeToString,
            response_deserializer=_class(method.output_type).FromString,
        )


def _class(kind: descriptor.Descriptor) -> type[Message]:
    return message_factory.GetMessageClass(kind)
