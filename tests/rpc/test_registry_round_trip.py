"""An adapter made by PEFT goes through the registry and comes back the same, for a client without stubs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from lorafleet.registry.v1 import base_model_pb2
from services.common.fingerprint import linear_module_table
from services.common.server import ServiceHost
from services.registry.service import SERVICES, Registry
from tests.support.models import ALL_LINEAR_TARGETS, load_peft_adapters, wrap_with_peft
from tests.support.reflection import ReflectionClient
from tests.support.registry import Place, base_message, other_fingerprint, sha256
from tests.support.registry_fixtures import CONFIG, WEIGHTS, local

__all__ = ["local"]

PACKAGE = "lorafleet.registry.v1"
SERVICE = f"{PACKAGE}.AdapterService"
CHUNK_BYTES = 5000
FINGERPRINT = other_fingerprint(weights_digest=sha256(b"a base with biases"))
HIDDEN_SIZE, VOCAB_SIZE = 32, 40
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose attention layers have biases, so that `bias` has something to train."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB_SIZE,
        attention_bias=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def load_base(path: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)


def train_by_chance(base: Path, out: Path, settings: dict[str, Any]) -> torch.Tensor:
    """Write a PEFT folder in which everything trainable was moved by noise; return the model's logits."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"]} | settings))
    logits: torch.Tensor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = wrap_with_peft(load_base(base), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            logits = model(TOKENS).logits
    model.save_pretrained(out, save_embedding_layers=False)
    return logits


@asynccontextmanager
async def registry_address(place: Place) -> AsyncIterator[str]:
    """Run a registry; yield where it listens."""
    settings = place.settings()
    host = ServiceHost(settings, SERVICES)
    registry = Registry(settings)
    await registry.register(host)
    await registry.probe()
    try:
        yield str(await host.start())
    finally:
        await host.stop(grace_seconds=0)


def register_base(client: ReflectionClient, base: Path) -> None:
    model = base_message("biased", FINGERPRINT)
    model.hidden_size, model.vocab_size = HIDDEN_SIZE, VOCAB_SIZE
    del model.linear_modules[:]
    for name, (in_features, out_features) in linear_module_table(base).items():
        model.linear_modules.add(name=name, in_features=in_features, out_features=out_features)
    request = client.message(f"{PACKAGE}.CreateBaseModelRequest")
    known = base_model_pb2.CreateBaseModelRequest(base_model=model)
    request.ParseFromString(known.SerializeToString())
    client.call(f"{PACKAGE}.BaseModelService.CreateBaseModel", request)


def publish(client: ReflectionClient, folder: Path) -> Any:
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}

    def requests() -> Iterator[Message]:
        request = f"{PACKAGE}.PublishVersionRequest"
        header = client.message(
            f"{PACKAGE}.PublishVersionHeader",
            adapter="from-peft",
            base_fingerprint_digest=FINGERPRINT.digest,
            files=[
                client.message(f"{PACKAGE}.AdapterFile", name=name, digest=sha256(data), size_bytes=len(data))
                for name, data in files.items()
            ],
        )
        yield client.message(request, header=header)
        for name, data in files.items():
            for start in range(0, len(data), CHUNK_BYTES):
                piece = data[start : start + CHUNK_BYTES]
                chunk = client.message(f"{PACKAGE}.FileChunk", file=name, data=piece)
                yield client.message(request, chunk=chunk)

    return client.call(f"{SERVICE}.PublishVersion", requests())


def round_trip(address: str, base: Path, folder: Path, out: Path) -> tuple[Any, Any]:
    """Publish `folder`, resolve it, download it to `out`; return the version as published and as resolved."""
    with ReflectionClient(address, (("lorafleet-tenant", "acme"),)) as client:
        register_base(client, base)
        published = publish(client, folder)
        request = client.message(f"{PACKAGE}.ResolveVersionRequest", ref="from-peft")
        resolved = client.call(f"{SERVICE}.ResolveVersion", request)
        out.mkdir()
        for file in resolved.files:
            request = client.message(
                f"{PACKAGE}.DownloadVersionRequest", ref=f"from-peft@{resolved.digest}", file=file.name
            )
            pieces = client.call(f"{SERVICE}.DownloadVersion", request)
            (out / file.name).write_bytes(b"".join(piece.data for piece in pieces))
    return published, resolved


RANKS = {"layers.0.self_attn.q_proj": 5, "up_proj": 2}
ALPHAS = {"layers.1.mlp.up_proj": 7, "q_proj": 3}


# PEFT takes the one-dimensional bias of B for a damaged matrix.
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("kind", "max_rank", "settings"),
    [
        ("LORA", 1, {"r": 1}),
        ("LORA", 8, {"r": 8, "target_modules": list(ALL_LINEAR_TARGETS)}),
        ("LORA", 4, {"r": 4, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
        ("LORA", 16, {"r": 16, "use_rslora": True, "task_type": None}),
        ("LORA", 5, {"r": 4, "rank_pattern": RANKS}),
        ("LORA", 5, {"r": 4, "rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": True}),
        ("LORA", 2, {"r": 2, "layers_to_transform": [1], "layers_pattern": "layers"}),
        ("LORA", 4, {"r": 4, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        ("LORA_SCALE", 4, {"r": 4, "use_dora": True}),
        ("LORA_BIAS", 4, {"r": 4, "lora_bias": True}),
        ("LORA_BIAS", 4, {"r": 4, "bias": "lora_only"}),
        ("HEAD", 4, {"r": 4, "modules_to_save": ["lm_head"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_what_peft_made_comes_back_byte_for_byte(
    base: Path, local: Place, tmp_path: Path, kind: str, max_rank: int, settings: dict[str, Any]
) -> None:
    made, got = tmp_path / "made", tmp_path / "got"
    logits = train_by_chance(base, made, settings)
    async with registry_address(local) as address:
        published, resolved = await asyncio.to_thread(round_trip, address, base, made, got)
    assert published.digest == resolved.digest
    enum = published.format.DESCRIPTOR.fields_by_name["kind"].enum_type
    assert enum.values_by_number[published.format.kind].name == f"DELTA_KIND_{kind}"
    assert published.format.max_rank == max_rank
    for name in (CONFIG, WEIGHTS):
        assert (got / name).read_bytes() == (made / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(load_peft_adapters(load_base(base), {"default": got})(TOKENS).logits, logits)
        assert not torch.allclose(load_base(base)(TOKENS).logits, logits, atol=1e-3)
