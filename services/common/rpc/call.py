"""One call under way on the server, as the layers around its method see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

OUR_PACKAGES = "/lorafleet."


@dataclass(slots=True)
class Call:
    """A call and what became of it; `code` and `reason` are final once the errors layer has been left."""

    method: str
    """Full name, `/package.Service/Method`."""

    is_streaming: bool
    """Whether requests or responses are a stream."""

    context: grpc.aio.ServicerContext[Any, Any]
    request_id: str = ""
    tenant: str | None = None
    client_timeout_seconds: float | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.metadata = tuple(self.context.invocation_metadata() or ())

    @property
    def is_ours(self) -> bool:
        """Whether the method is one of Lorafleet's services; health and reflection are not."""
        return self.method.startswith(OUR_PACKAGES)

    def values(self, key: str) -> list[str]:
        """Return the text values that the caller's metadata holds under `key`."""
        return [value for name, value in self.metadata if name == key and isinstance(value, str)]


Layer: TypeAlias = Callable[[Call], AbstractAsyncContextManager[None]]
"""What surrounds a call: entered before its method runs, left when it has ended, in whatever way."""
