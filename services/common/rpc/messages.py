"""Requests off the wire: taken apart inside the call's layers, so that a bad one is refused with a reason."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from services.common.errors import InvalidArgument, ResourceExhausted
from services.common.transport import MESSAGE_LIMIT_BYTES

Deserializer: TypeAlias = Callable[[bytes], Any]


def decoded(data: bytes, deserializer: Deserializer | None, method: str) -> Any:
    """Return the message in `data`; the bytes themselves where there is no deserializer.

    gRPC's own deserializing ends a call by INTERNAL or UNKNOWN, before any layer sees it.

    Raises:
        ResourceExhausted: `message_too_large`, above `MESSAGE_LIMIT_BYTES`.
        InvalidArgument: `malformed_message`, where the bytes are no message of the method's type.
    """
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise ResourceExhausted(
            "message_too_large",
            f"a message of {len(data)} bytes is above the limit; larger things travel as a stream of chunks",
            value=len(data),
            limit=MESSAGE_LIMIT_BYTES,
            final=True,
        )
    if deserializer is None:
        return data
    try:
        return deserializer(data)
    except DecodeError as error:
        raise InvalidArgument(
            "malformed_message", f"the bytes are not a request of {method}", value=len(data)
        ) from error


class DecodedStream:
    """Iterates over the messages of a stream, each as by `decoded`."""

    def __init__(
        self, messages: AsyncIterator[bytes], deserializer: Deserializer | None, method: str
    ) -> None:
        self._messages = messages
        self._deserializer = deserializer
        self._method = method

    def __aiter__(self) -> DecodedStream:
        return self

    async def __anext__(self) -> Any:
        return decoded(await anext(self._messages), self._deserializer, self._method)
