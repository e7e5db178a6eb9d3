"""Puts an engine together from its settings."""

from __future__ import annotations

import torch

from services.common.errors import FailedPrecondition
from services.inference.adapters.cache import AdapterCache, CacheBudget
from services.inference.adapters.disk import DiskTier, Fetcher
from services.inference.adapters.slots import DeviceSlots, StackCache
from services.inference.config import EngineConfig
from services.inference.engine.batch import Batch
from services.inference.engine.engine import Engine
from services.inference.engine.request import RequestLimits
from services.inference.engine.runner import Runner
from services.inference.model.attention import AttentionStep, PrefillSpan
from services.inference.model.kv import KvShape, PagedKv
from services.inference.model.loader import BaseModel, load_base


def build_engine(config: EngineConfig, fetcher: Fetcher) -> Engine:
    """Load the base model, allocate the KV cache and start the adapter loaders.

    Raises:
        FailedPrecondition: `base_missing`, `tokenizer_not_fast`, or `kv_too_small` for one block.
        Unimplemented: `attention_feature_unsupported`, of the base's architecture.
    """
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    device = config.torch_device
    base = load_base(config.base_path, config.base_quantization, device)
    kv = _allocate_kv(config, base)
    _run_once(base, kv)
    adapters = AdapterCache(
        fetcher,
        DiskTier(config.adapter_cache_path, config.adapter_disk_bytes),
        DeviceSlots(device, config.adapter_device_bytes),
        base.targets,
        base.dtype,
        CacheBudget(config.adapter_host_bytes, config.loader_threads, config.adapter_failure_seconds),
    )
    return Engine(
        base,
        kv,
        adapters,
        StackCache(config.adapter_stack_bytes),
        RequestLimits(_max_model_len(config, base, kv), base.vocab_size),
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
    )


def _allocate_kv(config: EngineConfig, base: BaseModel) -> PagedKv:
    shape = KvShape.of(base.model.config, config.block_size, base.dtype)
    num_blocks = config.kv_bytes // shape.block_bytes
    if num_blocks == 0:
        raise FailedPrecondition(
            "kv_too_small",
            f"One KV block takes {shape.block_bytes} bytes; kv_bytes is {config.kv_bytes}.",
            field="kv_bytes",
            value=config.kv_bytes,
            limit=shape.block_bytes,
        )
    return PagedKv(shape, num_blocks, base.device)


def _run_once(base: BaseModel, kv: PagedKv) -> None:
    """Run one token, so that an architecture we cannot serve is refused now, not by the first request."""
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


def _max_model_len(config: EngineConfig, base: BaseModel, kv: PagedKv) -> int:
    """The base's limit, lowered by the settings and by what the KV cache can hold for one sequence."""
    wanted = config.max_model_len or base.max_position_embeddings
    return min(wanted, base.max_position_embeddings, kv.num_blocks * config.block_size)
