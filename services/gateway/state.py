"""What the routes of one gateway share."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from services.gateway.config import GatewaySettings
from services.gateway.keys import KeyRing
from services.gateway.metering import Meter
from services.gateway.served_base import ServedBase
from services.gateway.upload_parts import UploadParts
from services.gateway.uploads import UploadSpace
from services.gateway.upstream import Upstream
from services.gateway.usage import UsageBook


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of a running gateway."""

    settings: GatewaySettings
    upstream: Upstream
    keys: KeyRing
    served_base: ServedBase
    uploads: UploadSpace
    upload_parts: UploadParts
    meter: Meter
    usage: UsageBook


def gateway_of(request: Request) -> Gateway:
    """Return the gateway that a request came to."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
