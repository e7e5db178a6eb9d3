"""The inference service's settings, read once from the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.common.fingerprint import ComputeDtype, Quantization

MIB = 1 << 20

Bytes = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class EngineConfig(BaseSettings):
    """What the engine may use and how it computes. Environment variables are `LORAFLEET_INFERENCE_<NAME>`.

    Attributes:
        base_path: folder of the base model, in transformers' layout.
        quantization: `nf4` (bitsandbytes, double quantisation) or `none`.
        compute_dtype: what the model computes in; `auto` is float32 on a CPU and bfloat16 on a GPU.
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        cpu_threads: threads of one forward pass on a CPU; 0 leaves the library's choice.
        kv_bytes: device memory of the KV cache.
        block_size: tokens per KV block.
        max_model_len: longest prompt and completion together; 0 means the base model's own limit.
        max_batch_tokens: most tokens of one step; longer prompts are run in chunks.
        max_num_seqs: most sequences of one step.
        max_queued_requests: most requests alive; more are refused.
        adapter_device_bytes: device memory of adapters.
        adapter_stack_bytes: device memory of copies of adapters that decode together.
        adapter_host_bytes: host memory of adapters.
        adapter_disk_bytes: disk space of fetched adapters.
        adapter_cache_path: folder of fetched adapters.
        adapter_failure_seconds: how long a failed load is remembered.
        loader_threads: adapters loaded at once.
    """

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_INFERENCE_", frozen=True, extra="forbid")

    base_path: Path
    adapter_cache_path: Path
    quantization: Literal["nf4", "none"] = "nf4"
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: Annotated[int, Field(ge=0)] = 0
    kv_bytes: Bytes = 256 * MIB
    block_size: Annotated[int, Field(gt=0, le=256)] = 16
    max_model_len: Annotated[int, Field(ge=0)] = 0
    max_batch_tokens: Count = 2048
    max_num_seqs: Count = 64
    max_queued_requests: Count = 1024
    adapter_device_bytes: Bytes = 256 * MIB
    adapter_stack_bytes: Bytes = 128 * MIB
    adapter_host_bytes: Bytes = 1024 * MIB
    adapter_disk_bytes: Bytes = 8192 * MIB
    adapter_failure_seconds: Seconds = 10.0
    loader_threads: Count = 4

    @model_validator(mode="after")
    def _every_sequence_can_decode(self) -> EngineConfig:
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}, less than max_num_seqs, {self.max_num_seqs}"
            )
        return self

    @property
    def torch_device(self) -> torch.device:
        """The device, with `auto` decided."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def base_quantization(self) -> Quantization:
        """How the base's linear weights are stored, as its fingerprint records it."""
        if self.compute_dtype == "auto":
            on_cpu = self.torch_device.type == "cpu"
            dtype = ComputeDtype.FLOAT32 if on_cpu else ComputeDtype.BFLOAT16
        else:
            dtype = ComputeDtype(self.compute_dtype)
        return Quantization.none(dtype) if self.quantization == "none" else Quantization.nf4(dtype)
