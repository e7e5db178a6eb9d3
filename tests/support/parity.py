"""What parity means: many requests decoded together equal each alone in transformers and PEFT."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from services.inference.engine.batch import Batch
from services.inference.engine.engine import Engine
from tests.support.architectures import Architecture
from tests.support.engines import digest_of, request, run_all, tokens_of
from tests.support.models import VOCAB_SIZE, load_peft_adapters, make_peft_adapter

LOGITS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Work:
    """One request: a prompt for an adapter, or for the base."""

    name: str
    prompt: tuple[int, ...]
    adapter: str | None


def adapter_settings(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """Return what PEFT is asked for, by a name that says what and at which rank."""
    linears, few = architecture.linears, architecture.few
    settings: dict[str, dict[str, Any]] = {
        "few-4": {"r": 4, "targets": few},
        "all-16": {"r": 16, "targets": linears},
        "all-linear-5": {"r": 5, "targets": "all-linear"},
        "rslora-32": {"r": 32, "targets": linears, "use_rslora": True, "lora_alpha": 8},
        "pattern-8": {
            "r": 8,
            "targets": linears,
            "rank_pattern": {few[0]: 4, linears[-1]: 2},
            "alpha_pattern": {linears[-1]: 24},
        },
        "partial-64": {"r": 64, "targets": linears, "layers_to_transform": [1], "lora_alpha": 96},
        "dora-8": {"r": 8, "targets": linears, "use_dora": True},
        "dora-head-6": {"r": 6, "targets": (*few, "lm_head"), "use_dora": True},
        "lora-bias-8": {"r": 8, "targets": linears, "lora_bias": True},
        "base-bias-8": {"r": 8, "targets": linears, "bias": "lora_only"},
        "both-biases-4": {"r": 4, "targets": linears, "bias": "lora_only", "lora_bias": True},
        "ends-8": {"r": 8, "targets": (*few, "lm_head", architecture.embedding)},
        "whole-head-4": {"r": 4, "targets": few, "modules_to_save": ["lm_head"]},
    }
    if architecture.has_experts:
        # There PEFT takes "all-linear" to mean the experts too.
        del settings["all-linear-5"]
    return settings


def make_adapters(
    base: Path, root: Path, architecture: Architecture, names: Sequence[str] | None = None
) -> dict[str, Path]:
    """Have PEFT write the adapters called `names`, or all of them."""
    settings = adapter_settings(architecture)
    return {
        name: make_peft_adapter(base, root / name, seed=seed, **settings[name])
        for seed, name in enumerate(settings if names is None else names)
    }


class PeftReference:
    """transformers and PEFT, one adapter to a model and one request at a time.

    PEFT writes an adapter's biases into the base it wraps, so no two adapters share one here.
    """

    def __init__(self, base: Path, adapters: Mapping[str, Path], *, nf4: bool) -> None:
        self._base = base
        self._adapters = adapters
        self._nf4 = nf4
        self._models: dict[str | None, Any] = {}

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int], adapter: str | None) -> Tensor:
        """Return the logits [tokens, vocabulary] over `token_ids`."""
        ids = torch.tensor([list(token_ids)])
        result: Tensor = self._model(adapter)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        return result

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], adapter: str | None, num_tokens: int) -> list[int]:
        """Return `num_tokens` tokens of the greedy continuation of `prompt`, by transformers' own loop."""
        ids = torch.tensor([list(prompt)])
        output = self._model(adapter).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            do_sample=False,
        )
        return [int(token) for token in output[0, len(prompt) :]]

    def _model(self, adapter: str | None) -> Any:
        if adapter not in self._models:
            base = _load(self._base, self._nf4)
            folder = None if adapter is None else self._adapters[adapter]
            self._models[adapter] = base if folder is None else load_peft_adapters(base, {"default": folder})
        return self._models[adapter]


def _load(base: Path, nf4: bool) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        local_files_only=True,
        attn_implementation="eager",
        quantization_config=quantization if nf4 else None,
        device_map={"": "cpu"},
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


class LogitsRecorder:
    """Keeps the logits that the engine chose each token from."""

    def __init__(self, engine: Engine) -> None:
        self.rows: dict[str, dict[int, Tensor]] = {}
        self._runner = engine._runner
        engine._runner = self  # type: ignore[assignment]

    def run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the batch and keep the rows that tokens are chosen from."""
        logits, hidden = self._runner.run(batch)
        for span in batch.logit_spans:
            if span.samples:
                kept = self.rows.setdefault(span.sequence.request.id, {})
                kept[span.position + span.end - span.start] = logits[span.end - 1].clone()
        return logits, hidden

    def recover(self) -> None:
        """As the runner."""
        self._runner.recover()

    def stop(self, engine: Engine) -> None:
        """Give the engine its own runner back."""
        engine._runner = self._runner


def mixed_work(
    adapters: Sequence[str], *, count: int = 32, seed: int = 3, shared_prefix: int = 0
) -> list[Work]:
    """Return `count` requests of unlike lengths over all `adapters` and the base, in turn.

    The prompts of one adapter begin with the same `shared_prefix` tokens, whatever the seed.
    """
    draw = random.Random(seed)
    owners: list[str | None] = [None, *adapters]
    fixed = random.Random(0)
    prefixes = {
        owner: tuple(fixed.randrange(6, VOCAB_SIZE) for _ in range(shared_prefix)) for owner in owners
    }
    lengths = (1, 2, 5, 9, 14, 23, 33)
    work = []
    for number in range(count):
        owner = owners[number % len(owners)]
        own = tuple(draw.randrange(6, VOCAB_SIZE) for _ in range(draw.choice(lengths)))
        work.append(Work(f"r{number}", prefixes[owner] + own, owner))
    return work


def assert_parity(
    engine: Engine, reference: PeftReference, work: Sequence[Work], *, num_tokens: int = 8
) -> None:
    """Run `work` together; every token is the greedy choice of transformers and PEFT for that request alone,
    and the logits are within `LOGITS_TOLERANCE` of theirs.
    """
    recorder = LogitsRecorder(engine)
    for item in work:
        engine.add(request(item.name, item.prompt, item.adapter, max_tokens=num_tokens, ignore_eos=True))
    events = run_all(engine)
    for item in work:
        tokens = tokens_of(events[item.name])
        where = f"{item.name}, {len(item.prompt)} tokens, adapter {item.adapter}"
        assert len(tokens) == num_tokens, (where, events[item.name][-1].error)
        alone = reference.logits([*item.prompt, *tokens[:-1]], item.adapter)[len(item.prompt) - 1 :]
        rows = recorder.rows[item.name]
        ours = torch.stack([rows[len(item.prompt) + step] for step in range(num_tokens)])
        error = (ours - alone).abs().max().item()
        assert tokens == alone.argmax(-1).tolist(), f"{where}: other tokens; logits differ by {error:.1e}"
        assert error <= LOGITS_TOLERANCE, f"{where}: logits differ by {error:.1e}"
    recorder.stop(engine)
    stats = engine.stats()
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert all(entry.leases == 0 and entry.pins == 0 for entry in engine.adapters.residency())


class Scenarios:
    """The circumstances in which parity must hold; `make` builds an engine with the given settings."""

    def __init__(
        self, make: Callable[..., Engine], reference: PeftReference, adapters: Mapping[str, Path]
    ) -> None:
        self._make = make
        self._reference = reference
        self._adapters = list(adapters)

    def together(self) -> None:
        """Everything in one batch."""
        engine = self._make()
        assert_parity(engine, self._reference, mixed_work(self._adapters))
        assert engine.stats().steps < 32 * 8 / 4, "the requests did not share steps"

    def chunked(self) -> None:
        """Prompts longer than a step may be."""
        engine = self._make(max_batch_tokens=17, max_num_seqs=16)
        assert_parity(engine, self._reference, mixed_work(self._adapters))

    def preempted(self) -> None:
        """More sequences than the KV cache can hold to their end."""
        block_bytes = self._make().stats().kv_block_bytes
        engine = self._make(kv_bytes=48 * block_bytes, device_own_share=1.0)
        assert_parity(engine, self._reference, mixed_work(self._adapters))
        assert engine.stats().preemptions > 0

    def reloaded(self) -> None:
        """Adapters that are evicted and loaded again between requests."""
        engine = self._make()
        for seed in (3, 4):
            assert_parity(engine, self._reference, mixed_work(self._adapters, seed=seed))
            for name in self._adapters:
                assert engine.adapters.evict(digest_of(name))
        assert engine.adapters.stats().loads == 2 * len(self._adapters)

    def crowded(self) -> None:
        """A device with room for one adapter or two."""
        sizes = self._make()
        assert_parity(sizes, self._reference, mixed_work(self._adapters, count=len(self._adapters) + 1))
        largest_bytes = max(entry.size_bytes for entry in sizes.adapters.residency())
        engine = self._make(adapter_device_bytes=largest_bytes + 1, device_own_share=1.0)
        assert_parity(engine, self._reference, mixed_work(self._adapters))
        assert engine.adapters.stats().device_evictions > 0

    def prefixed(self) -> None:
        """Prompts whose beginnings are in the prefix cache, each adapter's its own."""
        engine = self._make()
        for seed in (3, 4):
            before = engine.stats().prefix_hit_tokens
            work = mixed_work(self._adapters, seed=seed, shared_prefix=13)
            assert_parity(engine, self._reference, work)
        assert engine.stats().prefix_hit_tokens - before >= 12 * len(work)


SCENARIOS = ("together", "chunked", "preempted", "reloaded", "crowded", "prefixed")
