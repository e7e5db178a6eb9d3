"""The settings of the inference process: the engine's, the server's, and where the registry is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_settings import SettingsConfigDict

from services.common import names
from services.common.config import ListenAddress, PeerSettings, RedisUrl, ServiceSettings
from services.common.errors import InvalidArgument
from services.inference.config import EngineConfig


def _checked(check: Callable[[str], str]) -> Callable[[str], str]:
    """Return `check` with the error that settings expect."""

    def checked(text: str) -> str:
        try:
            return check(text)
        except InvalidArgument as error:
            raise ValueError(error.message) from error

    return checked


TenantName = Annotated[str, AfterValidator(_checked(names.tenant_name))]
AliasName = Annotated[str, AfterValidator(_checked(names.alias_name))]


class InferenceSettings(PeerSettings, ServiceSettings, EngineConfig):
    """What `python -m services.inference` reads; variables are `LORAFLEET_INFERENCE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_INFERENCE_")

    listen: ListenAddress = "127.0.0.1:7103"

    base_name: Annotated[str, AfterValidator(_checked(names.base_name))]
    """Name under which the base is registered and reported."""

    registry_target: ListenAddress = "127.0.0.1:7101"
    """`HOST:PORT` of the registry."""

    resolve_timeout_seconds: float = Field(default=5.0, gt=0, le=60)
    """How long one look-up of a reference may take."""

    resolve_fresh_seconds: float = Field(default=5.0, ge=0, le=3600)
    """How long a resolved digest or version number is used without asking again."""

    resolve_stale_seconds: float = Field(default=600.0, ge=0, le=86400)
    """How old an answer may be that stands in while the registry cannot be reached."""

    fetch_timeout_seconds: float = Field(default=300.0, gt=0, le=3600)
    """How long the download of one adapter may take."""

    redis_url: RedisUrl | None = None
    """Redis or Valkey in which routers find this replica; nothing is published without it."""

    advertised_address: ListenAddress | None = None
    """`HOST:PORT` under which routers reach this replica; `listen` where it is not set."""

    prefetch_tenants: Annotated[tuple[TenantName, ...], Field(max_length=64)] = ()
    """JSON list of the tenants whose adapters are prefetched on the registry's events; none by default."""

    prefetch_aliases: tuple[AliasName, ...] = ()
    """JSON list of aliases: when one of them moves to a version, that is prefetched."""

    prefetch_new_versions: bool = False
    """Prefetch each new version of an adapter of which another version is in memory."""
