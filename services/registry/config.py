"""The registry's settings, from variables that begin with LORAFLEET_REGISTRY_."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.adapter_format import DEFAULT_LIMITS, AdapterLimits
from services.common.config import FileSettings, IndexSettings, ServiceSettings, StoreSettings

MAX_LEASE_SECONDS = 3600


class RegistrySettings(IndexSettings, StoreSettings, FileSettings, ServiceSettings):
    """Settings of the registry process."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_REGISTRY_")

    max_rank: int = Field(default=DEFAULT_LIMITS.max_rank, ge=1, le=4096)
    """Largest rank of an adapter's layer; the inference engine's maximum."""

    max_weights_bytes: int = Field(default=DEFAULT_LIMITS.max_weights_bytes, ge=1)
    """Largest `adapter_model.safetensors`."""

    max_delta_norm: float = Field(default=DEFAULT_LIMITS.max_delta_norm, gt=0)
    """Largest `scale * |B| * |A|` of one layer; see `AdapterLimits`."""

    quota_bytes: int = Field(default=0, ge=0)
    """Most that one tenant may keep, adapters and files together; 0 means no quota."""

    upload_seconds: float = Field(default=3600.0, gt=0, le=86400)
    """How long a resumable upload may stay open."""

    max_open_uploads: int = Field(default=64, ge=1, le=1000)
    """Resumable uploads that one tenant may have open at once."""

    max_transfers: int = Field(default=16, ge=1, le=1024)
    """Uploads and downloads whose bytes move at once, with a few MiB of memory each; others wait."""

    gc_interval_seconds: float = Field(default=6 * 3600.0, gt=0)
    """Pause between two rounds of garbage collection."""

    gc_grace_seconds: float = Field(default=24 * 3600.0, ge=MAX_LEASE_SECONDS)
    """How long bytes stay that nothing names any more; at least as long as the longest lease."""

    scratch_dir: Path | None = None
    """Folder for bytes on their way in; beside a store that is a directory, else the system's temporary one,
    when unset."""

    def limits(self) -> RegistryLimits:
        """The limits among these settings."""
        adapter = AdapterLimits(
            max_rank=self.max_rank,
            max_weights_bytes=self.max_weights_bytes,
            max_delta_norm=self.max_delta_norm,
        )
        return RegistryLimits(
            adapter=adapter,
            max_file_bytes=self.max_file_bytes,
            upload_seconds=self.upload_seconds,
            max_open_uploads=self.max_open_uploads,
        )


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """What the registry accepts at most.

    Attributes:
        max_file_bytes: size of one file.
        adapter: limits of the adapter format.
        max_linear_layers: layers that a base may list.
        upload_seconds: how long a resumable upload may stay open.
        max_open_uploads: resumable uploads of one tenant at once.
    """

    max_file_bytes: int
    adapter: AdapterLimits = DEFAULT_LIMITS
    max_linear_layers: int = 65_536
    upload_seconds: float = 3600.0
    max_open_uploads: int = 64
