"""Settings of the gateway, from `LORAFLEET_GATEWAY_*`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.common.config import (
    FileSettings,
    ListenAddress,
    PeerSettings,
    RedisUrl,
    ServiceSettings,
    StoreSettings,
    parse_address,
)

KEY_CACHE_LIMIT_SECONDS = 60.0


def _checked_targets(text: str) -> str:
    """Return a comma list of addresses without blanks; it may be empty."""
    return ",".join(str(parse_address(target.strip())) for target in text.split(",") if target.strip())


class GatewaySettings(StoreSettings, PeerSettings, FileSettings, ServiceSettings):
    """What the gateway reads at its start."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_GATEWAY_")

    listen: ListenAddress = "127.0.0.1:8000"

    listen_fd: int | None = Field(default=None, ge=3)
    """File descriptor of a socket that listens on `listen` already, from whoever started this process and
    keeps it: clients that come while the process is started again wait in its queue, and are not refused."""

    grpc_listen: ListenAddress | None = None
    """Where gRPC clients are served, with the same keys; not at all when absent."""

    redis_url: RedisUrl | None = None
    """Redis or Valkey that holds the limits of all gateways; each keeps its own when absent."""

    registry_target: ListenAddress = "127.0.0.1:7101"
    trainer_target: ListenAddress = "127.0.0.1:7102"

    inference_target: Annotated[str, AfterValidator(_checked_targets)] = "127.0.0.1:7103"
    """Inference replicas, `HOST:PORT` with commas between; may be empty where `inference_base` is set."""

    inference_base: str | None = None
    """Base whose replicas join by themselves as they tell of themselves in Redis; none do when absent."""

    replica_wait_seconds: float = Field(default=30.0, ge=0, le=600)
    """How long after the first failure requests whose answers have not begun wait for inference to come back,
    which takes ten seconds or more; those that come later are refused at once."""

    key_pepper: Annotated[SecretStr, Field(min_length=16)]
    """Secret under which API keys are hashed; without it stored keys cannot be checked."""

    key_cache_seconds: float = Field(default=1.0, ge=0, le=KEY_CACHE_LIMIT_SECONDS)
    """How long a checked key is trusted before the store is asked again."""

    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024)
    """Largest JSON body."""

    header_timeout_seconds: float = Field(default=10.0, gt=0, le=600)
    """How long the head of a request may take from its first byte on."""

    body_timeout_seconds: float = Field(default=30.0, gt=0, le=600)
    """Period in which at least 32 KiB of a body must come, or its end."""

    stalled_timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    """How long a client may leave an answer unread before its connection is closed."""

    max_concurrent_uploads: int = Field(default=8, ge=1, le=1024)
    """Uploads that may be held on disk at the same time."""

    @property
    def inference_targets(self) -> tuple[str, ...]:
        """`inference_target`, one by one."""
        return tuple(dict.fromkeys(target for target in self.inference_target.split(",") if target))

    @model_validator(mode="after")
    def _inference_can_be_found(self) -> Self:
        if self.inference_base is not None and self.redis_url is None:
            raise ValueError("INFERENCE_BASE needs REDIS_URL, where replicas tell of themselves")
        if self.inference_base is None and not self.inference_targets:
            raise ValueError("set INFERENCE_TARGET, or INFERENCE_BASE and REDIS_URL")
        return self
