"""Many random adapters of mixed ranks, published to a real registry in a process of its own."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peft import LoraConfig
from safetensors.torch import save
from transformers import AutoConfig

from bench.service_process import START_SECONDS, service_process
from lorafleet.registry.v1 import adapter_pb2, base_model_pb2
from services.common.base_models import base_model
from services.common.channels import open_channel
from services.common.fingerprint import Quantization, fingerprint_base
from services.common.transport import CHUNK_BYTES
from services.common.valkey import EmbeddedValkey
from tests.support.registry import Client, sha256

RANKS = (4, 8, 16, 32)
BASE_NAME = "bench"
TENANT = "acme"
_PUBLISHERS = 4


@dataclass(frozen=True, slots=True)
class RandomAdapter:
    """An adapter of random weights on all linear layers of a Llama, in bfloat16."""

    name: str
    rank: int
    seed: int


def mixed(count: int) -> list[RandomAdapter]:
    """Return `count` adapters, their ranks drawn evenly from `RANKS`."""
    draw = random.Random(0)
    return [RandomAdapter(f"adapter-{number}", draw.choice(RANKS), number) for number in range(count)]


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Return (in, out) of every linear layer of the decoder of a Llama, by name."""
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.head_dim * config.num_attention_heads
    keys = config.head_dim * config.num_key_value_heads
    layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{number}.{name}": shape
        for number in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }


def files_of(adapter: RandomAdapter, shapes: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """Return the two files of an adapter, as PEFT would write them."""
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.rank, target_modules=targets, task_type="CAUSAL_LM"
    ).to_dict()
    config["target_modules"] = targets
    config["peft_type"] = "LORA"
    generator = torch.Generator().manual_seed(adapter.seed)
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        for side, shape in (("A", (adapter.rank, inputs)), ("B", (outputs, adapter.rank))):
            values = torch.randn(shape, generator=generator) * 0.02
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = values.to(torch.bfloat16)
    text = json.dumps(config, default=str).encode()
    return {"adapter_config.json": text, "adapter_model.safetensors": save(tensors)}


@asynccontextmanager
async def published(
    folder: Path, base: Path, quantization: Quantization, adapters: Sequence[RandomAdapter]
) -> AsyncIterator[tuple[Client, str]]:
    """Run a registry with a base and `adapters` in it; yield a client and its address.

    What an earlier run has published in `folder` is not published again.
    """
    async with AsyncExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey.start(folder / "valkey"))
        settings = {"REDIS_URL": valkey.url, "STORE_URL": f"file://{folder}/store"}
        target = stack.enter_context(service_process("registry", folder, settings))
        channel = await stack.enter_async_context(open_channel(target))
        await asyncio.wait_for(until_serving(channel), START_SECONDS)
        client = Client(channel, TENANT)
        record = base_model(BASE_NAME, base, fingerprint_base(base, quantization))
        await client.call(
            client.bases.CreateBaseModel, base_model_pb2.CreateBaseModelRequest(base_model=record)
        )
        done = folder / "published"
        known = set(done.read_text().split()) if done.exists() else set()
        shapes, left = linear_shapes(base), iter([one for one in adapters if one.name not in known])
        await asyncio.gather(
            *(_publish_all(client, left, shapes, record.fingerprint.digest) for _ in range(_PUBLISHERS))
        )
        done.write_text("\n".join(known | {one.name for one in adapters}))
        yield client, target


async def until_serving(channel: grpc.aio.Channel) -> None:
    """Wait until the server says that it serves."""
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    while True:
        with suppress(grpc.aio.AioRpcError):
            answer = await health.Check(request, wait_for_ready=True, timeout=5)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
        await asyncio.sleep(0.02)


async def _publish_all(
    client: Client, adapters: Iterator[RandomAdapter], shapes: dict[str, tuple[int, int]], base_digest: str
) -> None:
    for adapter in adapters:
        files = await asyncio.to_thread(files_of, adapter, shapes)
        header = adapter_pb2.PublishVersionHeader(
            adapter=adapter.name,
            base_fingerprint_digest=base_digest,
            files=[
                adapter_pb2.AdapterFile(name=name, digest=sha256(data), size_bytes=len(data))
                for name, data in files.items()
            ],
        )
        await client.call(client.adapters.PublishVersion, _messages(header, files))


def _messages(
    header: adapter_pb2.PublishVersionHeader, files: dict[str, bytes]
) -> Iterator[adapter_pb2.PublishVersionRequest]:
    yield adapter_pb2.PublishVersionRequest(header=header)
    for name, data in files.items():
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = adapter_pb2.FileChunk(file=name, data=data[start : start + CHUNK_BYTES])
            yield adapter_pb2.PublishVersionRequest(chunk=chunk)
