"""Random bases of a wanted shape and their adapters, made quickly on a GPU, and what a machine can do.

The weights are drawn on the device, one tensor after the other, so that a base of 8B parameters takes its
time on the disk only.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.small_llama import make_adapter

# Llama 3.1 8B, and the same in small to try a script out.
SHAPES = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}
_SHARD_BYTES = 4 << 30
_END_TOKEN = "<|end|>"  # noqa: S105 - no password
_MIB = 1 << 20


def make_base(path: Path, shape: str, device: torch.device, *, seed: int = 0) -> Path:
    """Write a bfloat16 Llama of `shape` with random weights and a byte tokenizer to `path`; return `path`."""
    config = LlamaConfig(
        **SHAPES[shape],
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    path.mkdir(parents=True)
    config.save_pretrained(path)
    generator = torch.Generator(device).manual_seed(seed)
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    numbers = itertools.count()
    for name, parameter in model.named_parameters():
        shard[name] = _drawn(name, parameter, generator).cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
            index |= _save(shard, path, next(numbers))
            shard = {}
    index |= _save(shard, path, next(numbers))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _tokenizer().save_pretrained(path)
    return path


def _drawn(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=generator.device)
    return made.fill_(1.0) if name.endswith("norm.weight") else made.normal_(std=0.02, generator=generator)


def _save(shard: dict[str, Tensor], path: Path, number: int) -> dict[str, str]:
    if not shard:
        return {}
    file = f"model-{number:05d}.safetensors"
    save_file(shard, path / file, metadata={"format": "pt"})
    return dict.fromkeys(shard, file)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the bytes; ids beyond them stand for nothing."""
    words = [_END_TOKEN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END_TOKEN])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_END_TOKEN, eos_token=_END_TOKEN)


class OneFolder:
    """Fetches one adapter's files under every digest, so that many adapters take the disk of one."""

    def __init__(self, base: Path, path: Path, *, rank: int) -> None:
        self.folder = make_adapter(base, path, rank=rank, seed=1)

    def fetch(self, digest: str, into: Path) -> None:
        """Link the files into the folder `into`."""
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(self.folder / name, into / name)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes, the device's part included."""
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def copy_bytes_per_second(device: torch.device, *, repeats: int = 5) -> float:
    """Return the bandwidth of the device's memory: bytes read plus bytes written by a copy, a second."""
    size = (2048 if device.type == "cuda" else 64) * _MIB
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(repeats))


def product_flops(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Return the operations a second of a large matrix product of `dtype`."""
    side = 8192 if device.type == "cuda" else 512
    square = torch.ones(side, side, dtype=dtype, device=device)
    torch.matmul(square, square)
    median = statistics.median(seconds(lambda: torch.matmul(square, square), device) for _ in range(repeats))
    return 2 * side**3 / median
