"""The registry's settings, from variables that begin with LORAFLEET_REGISTRY_."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.adapter_format import DEFAULT_LIMITS, AdapterLimits
from services.common.adapter_format.limits import MIB
from services.common.config import IndexSettings, ServiceSettings, StoreSettings


class RegistrySettings(IndexSettings, StoreSettings, ServiceSettings):
    """Settings of the registry process."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_REGISTRY_")

    max_rank: int = Field(default=DEFAULT_LIMITS.max_rank, ge=1, le=4096)
    """Largest rank of an adapter's layer; the inference engine's maximum."""

    max_weights_bytes: int = Field(default=DEFAULT_LIMITS.max_weights_bytes, ge=1)
    """Largest `adapter_model.safetensors`."""

    max_delta_norm: float = Field(default=DEFAULT_LIMITS.max_delta_norm, gt=0)
    """Largest `scale * |B| * |A|` of one layer; see `AdapterLimits`."""

    max_file_bytes: int = Field(default=512 * MIB, ge=1)
    """Largest uploaded file."""

    scratch_dir: Path | None = None
    """Folder for uploads under way; the system's temporary folder when unset."""

    def limits(self) -> RegistryLimits:
        """The limits among these settings."""
        adapter = AdapterLimits(
            max_rank=self.max_rank,
            max_weights_bytes=self.max_weights_bytes,
            max_delta_norm=self.max_delta_norm,
        )
        return RegistryLimits(adapter=adapter, max_file_bytes=self.max_file_bytes)


@dataclass(frozen=True, slots=True)
class RegistryLimits:
    """What the registry accepts at most.

    Attributes:
        adapter: limits of the adapter format.
        max_file_bytes: size of one file.
        max_linear_layers: layers that a base may list.
    """

    adapter: AdapterLimits = DEFAULT_LIMITS
    max_file_bytes: int = 512 * MIB
    max_linear_layers: int = 65_536
