"""The inference service's settings, read once from the environment.

Reading them takes no torch, so that bad ones are refused at once.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.common.fingerprint import ComputeDtype, Quantization
from services.inference.adapters.device_budget import DeviceBudget

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
        kv_bytes: device memory of the KV cache, which grows into what adapters leave idle.
        block_size: tokens per KV block.
        max_model_len: longest prompt and completion together; 0 means the base model's own limit.
        max_batch_tokens: most tokens of one step; longer prompts are run in chunks.
        max_num_seqs: most sequences of one step.
        max_queued_requests: most requests alive; more are refused.
        tenant_queue_share: most of them that one tenant may have while no other has any; 1 is no limit.
        scheduling_policy: `fair` shares the engine among tenants and adapters; `fcfs` is first come, first
            served.
        ageing_seconds: how long a tenant's requests of higher priority may pass over one of lower priority.
        enable_prefix_cache: keep the keys and values of prompts for requests that begin with the same tokens.
        adapter_device_bytes: device memory of adapters, which grow into what the KV cache leaves idle.
        device_own_share: fraction of each of the two that the other never takes; 1 is a fixed boundary, which
            it always is on a GPU.
        kernels: `auto` for kernels where they serve: compiled on this host (float32 on a CPU with a C
            compiler), Triton's on a GPU where Triton is installed. `torch` for their torch forms only,
            `triton` for Triton's or nothing.
        decode_graphs: `auto` captures decode steps on a GPU with Triton's kernels, `off` captures none;
            `eager` pads and copies as for captured steps but runs them one kernel after the other, to tell
            what capturing does.
        decode_graph_bytes: most device memory of captured steps, beside `kv_bytes` and
            `adapter_device_bytes`; steps that take more run uncaptured.
        adapter_stack_bytes: device memory of copies of adapters that decode together; the compiled kernels
            need none.
        adapter_host_bytes: host memory of adapters.
        adapter_disk_bytes: disk space of fetched adapters.
        adapter_cache_path: folder of fetched adapters.
        adapter_pin_share: most of `adapter_device_bytes` that pinned adapters may take, as a fraction.
        adapter_failure_seconds: how long a failed load is remembered.
        loader_threads: adapters read from the disk to memory at once.
        download_threads: adapters downloaded at once.
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
    tenant_queue_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    scheduling_policy: Literal["fair", "fcfs"] = "fair"
    ageing_seconds: Seconds = 10.0
    enable_prefix_cache: bool = True
    adapter_device_bytes: Bytes = 256 * MIB
    device_own_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    kernels: Literal["auto", "torch", "triton"] = "auto"
    decode_graphs: Literal["auto", "off", "eager"] = "auto"
    decode_graph_bytes: Bytes = 1024 * MIB
    adapter_stack_bytes: Bytes = 128 * MIB
    adapter_host_bytes: Bytes = 1024 * MIB
    adapter_disk_bytes: Bytes = 8192 * MIB
    adapter_pin_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    adapter_failure_seconds: Seconds = 10.0
    loader_threads: Count = 2
    download_threads: Count = 16

    @model_validator(mode="after")
    def _every_sequence_can_decode(self) -> EngineConfig:
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}, less than max_num_seqs, {self.max_num_seqs}"
            )
        return self

    @model_validator(mode="after")
    def _triton_can_run(self) -> EngineConfig:
        if self.kernels == "triton":
            if importlib.util.find_spec("triton") is None:
                raise ValueError("kernels is triton, which is not installed")
            if self.device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError("kernels is triton, which needs a GPU, or its own interpreter")
        return self

    @property
    def device_type(self) -> Literal["cpu", "cuda"]:
        """The device, with `auto` decided."""
        if self.device != "auto":
            return self.device
        # Imported here: whoever only checks settings does not wait for it.
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def uses_triton(self) -> bool:
        """Whether the kernels are Triton's."""
        if self.kernels == "auto":
            return self.device_type == "cuda" and importlib.util.find_spec("triton") is not None
        return self.kernels == "triton"

    @property
    def device_budget(self) -> DeviceBudget:
        """A budget of the device's memory; on a GPU, where the KV cache is one allocation, a fixed one."""
        own_share = self.device_own_share if self.device_type == "cpu" else 1.0
        return DeviceBudget(self.kv_bytes, self.adapter_device_bytes, own_share=own_share)

    @property
    def base_quantization(self) -> Quantization:
        """How the base's linear weights are stored, as its fingerprint records it."""
        if self.compute_dtype == "auto":
            on_cpu = self.device_type == "cpu"
            dtype = ComputeDtype.FLOAT32 if on_cpu else ComputeDtype.BFLOAT16
        else:
            dtype = ComputeDtype(self.compute_dtype)
        return Quantization.none(dtype) if self.quantization == "none" else Quantization.nf4(dtype)
