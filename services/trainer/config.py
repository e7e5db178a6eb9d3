"""The trainer's settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.config import (
    FileSettings,
    IndexSettings,
    ListenAddress,
    PeerSettings,
    ServiceSettings,
    StoreSettings,
)
from services.common.fingerprint import ComputeDtype, Quantization
from services.common.store import ObjectStore, open_store


class TrainerSettings(IndexSettings, StoreSettings, PeerSettings, FileSettings, ServiceSettings):
    """What the service, its workers and their child processes read from the environment."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_TRAINER_")

    registry_target: ListenAddress
    """Address of the registry, `HOST:PORT`."""

    inference_target: ListenAddress | None = None
    """Address of an inference service, `HOST:PORT`, that checks versions before they are published.
    Where it serves another base, or none is named, there is no such check."""

    parity_tolerance_nats: float | None = Field(default=None, gt=0, le=10)
    """How far a token's log-probability may differ from training to serving; absent: by `compute_dtype`."""

    bases: dict[str, Path] = Field(min_length=1)
    """The bases that can be trained on: a JSON object from name to folder."""

    quantization: Literal["nf4", "none"] = "nf4"
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What matrix products run in; `auto` is float32 on a CPU and bfloat16 on a GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where jobs run; `auto` takes CUDA where there is any."""

    concurrency: int = Field(default=1, ge=1, le=64)
    """Jobs trained at a time."""

    joint_jobs: int = Field(default=8, ge=1, le=64)
    """Most jobs that train together on one copy of their base; 1 trains each alone."""

    memory_limit_bytes: int = Field(default=0, ge=0)
    """What a job may use, its base included; 0 takes the free memory of a CPU, all memory of a GPU."""

    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of one job; 0 takes all cores."""

    niceness: int = Field(default=5, ge=0, le=19)
    """How far a job steps back behind other processes for CPU time."""

    lease_seconds: float = Field(default=10.0, ge=1, le=600)
    """After this long without a sign of life another worker takes a job up."""

    cancel_grace_seconds: float = Field(default=3.0, ge=0, le=60)
    """How long a job may take to stop at a cancel before it is killed."""

    max_crashes: int = Field(default=3, ge=1, le=100)
    """Crashes in a row, without a checkpoint between them, after which a job fails."""

    event_interval_seconds: float = Field(default=0.5, ge=0, le=60)
    """Shortest time between two metrics events of a job."""

    work_folder: Path | None = None
    """Where jobs keep files while they run; the system's temporary folder when absent."""

    def open_store(self) -> ObjectStore:
        """Return the object store."""
        access_key, secret_key = self.store_access_key, self.store_secret_key
        return open_store(
            self.store_url,
            access_key=access_key.get_secret_value() if access_key else None,
            secret_key=secret_key.get_secret_value() if secret_key else None,
        )

    @property
    def base_quantization(self) -> Quantization:
        """The form that bases are loaded in."""
        automatic = "bfloat16" if self.device_type == "cuda" else "float32"
        dtype = ComputeDtype(automatic if self.compute_dtype == "auto" else self.compute_dtype)
        if self.quantization == "none":
            return Quantization.none(dtype)
        return Quantization.nf4(dtype)

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        """The kind of device that jobs run on."""
        if self.device != "auto":
            return self.device
        if not Path("/dev/nvidiactl").exists():
            return "cpu"
        # Only a machine with a GPU driver pays for it: the service itself has no use for torch.
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def torch_threads(self) -> int:
        """CPU threads of one job."""
        return self.threads or os.cpu_count() or 1
