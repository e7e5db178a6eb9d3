"""Puts an engine together from its settings."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from services.common.errors import FailedPrecondition, Unimplemented
from services.inference.adapters.cache import AdapterCache, CacheBudget
from services.inference.adapters.device_budget import DeviceBudget
from services.inference.adapters.disk import DiskTier, Fetcher
from services.inference.adapters.slots import DeviceSlots, StackCache
from services.inference.config import EngineConfig
from services.inference.engine.batch import Batch
from services.inference.engine.blocks import BlockPool
from services.inference.engine.engine import Engine
from services.inference.engine.graphs import Capture, DecodeGraphs, run_again
from services.inference.engine.policy import FairShare, FirstCome, QueuePolicy
from services.inference.engine.request import RequestLimits
from services.inference.engine.runner import Runner
from services.inference.kernels.library import Kernels, load_kernels
from services.inference.model.architecture import check_architecture
from services.inference.model.attention import AttentionStep, PrefillSpan
from services.inference.model.kv import KvShape, PagedKv
from services.inference.model.loader import BaseModel, load_base


def build_engine(config: EngineConfig, fetcher: Fetcher) -> Engine:
    """Load the base model, allocate the KV cache, capture its steps on a GPU, and start the adapter loaders.

    Raises:
        FailedPrecondition: `base_missing`, `tokenizer_not_fast`, or `kv_too_small` for one block.
        Unimplemented: `architecture_unsupported` or `attention_feature_unsupported`.
    """
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    device = torch.device(config.device_type)
    check_architecture(config.base_path)
    base = load_base(config.base_path, config.base_quantization, device, _kernels(config))
    base, capture = _on_triton(config, base) if config.uses_triton else (base, None)
    if config.decode_graphs == "eager":
        capture = run_again
    budget = config.device_budget
    kv = _allocate_kv(config, base, budget)
    _run_once(base, kv)
    max_model_len = _max_model_len(config, base, kv)
    graphs = None
    if capture is not None:
        graphs = DecodeGraphs(base, kv, max_rows=config.max_num_seqs, max_model_len=max_model_len)
        graphs.capture(capture)
    adapters = AdapterCache(
        fetcher,
        DiskTier(config.adapter_cache_path, config.adapter_disk_bytes),
        DeviceSlots(device, budget),
        base.targets,
        base.dtype,
        CacheBudget(
            host_bytes=config.adapter_host_bytes,
            kept_bytes=int(config.adapter_pin_share * config.adapter_device_bytes),
            loader_threads=config.loader_threads,
            download_threads=config.download_threads,
            failure_seconds=config.adapter_failure_seconds,
        ),
    )
    return Engine(
        base,
        kv,
        BlockPool(kv, config.block_size, budget, is_caching=config.enable_prefix_cache),
        _policy(config),
        adapters,
        None if base.binding.kernel is not None else StackCache(config.adapter_stack_bytes),
        RequestLimits(max_model_len, base.vocab_size),
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        graphs=graphs,
    )


def _kernels(config: EngineConfig) -> Kernels | None:
    """Compile the kernels, or load what was compiled before, where they are wanted and serve."""
    wanted = config.kernels == "auto" and config.device_type == "cpu"
    return load_kernels() if wanted else None


def _on_triton(config: EngineConfig, base: BaseModel) -> tuple[BaseModel, Capture | None]:
    """Put Triton's kernels in the place of the torch forms; return how decode steps are then captured."""
    # Imported here: Triton is there only beside a CUDA build of torch.
    from services.inference.engine.cuda_graph import CudaCapture
    from services.inference.kernels.triton_attention import TritonAttention
    from services.inference.model.triton_linear import install_triton

    lora = install_triton(
        base.model, base.binding, max_rows=config.max_batch_tokens, max_adapters=config.max_num_seqs
    )
    capture = None
    if config.decode_graphs == "auto" and base.device.type == "cuda":
        capture = CudaCapture(lora, base.device, config.decode_graph_bytes)
    return replace(base, attention=TritonAttention()), capture


def _policy(config: EngineConfig) -> QueuePolicy:
    if config.scheduling_policy == "fcfs":
        return FirstCome()
    return FairShare(ageing_seconds=config.ageing_seconds, clock=time.monotonic)


def _allocate_kv(config: EngineConfig, base: BaseModel, budget: DeviceBudget) -> PagedKv:
    """Allocate as many blocks as the KV cache may ever have; `kv_bytes` alone must do for one extent."""
    shape = KvShape.of(base.model.config, config.block_size, base.dtype)
    # The scratch block is address space on a CPU, and memory on a GPU.
    scratch = 0 if base.device.type == "cpu" else 1
    kv = PagedKv(shape, max(budget.most_kv_bytes // shape.block_bytes - scratch, 0), base.device)
    if _own_blocks(config, kv) == 0:
        least_bytes = (min(kv.extent_blocks, kv.num_blocks or 1) + scratch) * shape.block_bytes
        raise FailedPrecondition(
            "kv_too_small",
            f"The KV cache takes memory by {least_bytes} bytes; kv_bytes is {config.kv_bytes}.",
            field="kv_bytes",
            value=config.kv_bytes,
            limit=least_bytes,
        )
    return kv


def _own_blocks(config: EngineConfig, kv: PagedKv) -> int:
    """Return how many blocks fit in `kv_bytes`, which a sequence that runs alone always has."""
    if kv.num_blocks * kv.block_bytes <= config.kv_bytes:
        return kv.num_blocks
    return config.kv_bytes // (kv.extent_blocks * kv.block_bytes) * kv.extent_blocks


def _run_once(base: BaseModel, kv: PagedKv) -> None:
    """Run one token, so that an architecture we cannot serve is refused now, not by the first request.

    Raises:
        Unimplemented: `attention_feature_unsupported`, also where a layer does not attend through the pages.
    """
    zero = torch.zeros(1, dtype=torch.long, device=base.device)
    span = PrefillSpan(start=0, length=1, context=0, table=zero[None])
    batch = Batch(
        chunks=(),
        input_ids=zero[None],
        position_ids=zero[None],
        attention=AttentionStep(kv, zero, decodes=(), prefills=(span,)),
        adapter_groups=(),
        logit_rows=zero,
        logit_spans=(),
    )
    Runner(base).run(batch)
    layers = batch.attention.layers
    if set(layers) != set(range(kv.shape.layers)):
        name = type(base.model).__name__
        raise Unimplemented(
            "attention_feature_unsupported",
            f"{len(layers)} of the {kv.shape.layers} layers of {name} have an attention that is served.",
            field="base",
            value=name,
        )


def _max_model_len(config: EngineConfig, base: BaseModel, kv: PagedKv) -> int:
    """The base's limit, lowered by the settings and by what the KV cache can hold for one sequence."""
    wanted = config.max_model_len or base.max_position_embeddings
    return min(wanted, base.max_position_embeddings, _own_blocks(config, kv) * config.block_size)
