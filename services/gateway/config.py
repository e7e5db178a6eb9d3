"""Settings of the gateway, from `LORAFLEET_GATEWAY_*`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from services.common.config import ListenAddress, PeerSettings, RedisUrl, ServiceSettings, StoreSettings

KEY_CACHE_LIMIT_SECONDS = 60.0


class GatewaySettings(StoreSettings, PeerSettings, ServiceSettings):
    """What the gateway reads at its start."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_GATEWAY_")

    listen: ListenAddress = "127.0.0.1:8000"

    grpc_listen: ListenAddress | None = None
    """Where gRPC clients are served, with the same keys; not at all when absent."""

    redis_url: RedisUrl | None = None
    """Redis or Valkey that holds the limits of all gateways; each keeps its own when absent."""

    registry_target: ListenAddress = "127.0.0.1:7101"
    trainer_target: ListenAddress = "127.0.0.1:7102"
    inference_target: ListenAddress = "127.0.0.1:7103"

    key_pepper: Annotated[SecretStr, Field(min_length=16)]
    """Secret under which API keys are hashed; without it stored keys cannot be checked."""

    key_cache_seconds: float = Field(default=1.0, ge=0, le=KEY_CACHE_LIMIT_SECONDS)
    """How long a checked key is trusted before the store is asked again."""

    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024)
    """Largest JSON body."""

    max_file_bytes: int = Field(default=512 * 1024 * 1024, ge=1, le=64 * 1024**3)
    """Largest uploaded file."""

    max_concurrent_uploads: int = Field(default=8, ge=1, le=1024)
    """Uploads that may be held on disk at the same time."""
