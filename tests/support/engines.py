"""Engines on tiny models, and the same answers from transformers and PEFT, one request at a time."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from services.common.errors import LorafleetError, NotFound
from services.inference.assembly import build_engine
from services.inference.config import EngineConfig
from services.inference.engine.engine import Engine
from services.inference.engine.events import TokenEvent
from services.inference.engine.request import Request, SamplingParams
from tests.support.models import load_peft_adapters


def digest_of(name: str) -> str:
    """Return a well-formed version digest that stands for `name`."""
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


class FolderFetcher:
    """Fetches adapters from folders, by digest; counts the fetches, and can be made slow or made to fail."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = {digest_of(name): folder for name, folder in folders.items()}
        self.fetches: list[str] = []
        self.delay_seconds: dict[str, float] = {}
        self.errors: dict[str, LorafleetError] = {}

    def fetch(self, digest: str, into: Path) -> None:
        self.fetches.append(digest)
        time.sleep(self.delay_seconds.get(digest, 0.0))
        if digest in self.errors:
            raise self.errors[digest]
        if digest not in self.folders:
            raise NotFound("version_not_found", "There is no such adapter version.", value=digest)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(self.folders[digest] / name, into / name)


def make_engine(base: Path, cache: Path, fetcher: FolderFetcher, **settings: Any) -> Engine:
    """Build a float32 CPU engine, unquantised unless told otherwise."""
    chosen: dict[str, Any] = {
        "quantization": "none",
        "compute_dtype": "float32",
        "device": "cpu",
        "cpu_threads": 1,
        "kv_bytes": 8 << 20,
        "device_own_share": 1.0,
        "block_size": 4,
        "max_batch_tokens": 256,
        "max_num_seqs": 32,
        **settings,
    }
    return build_engine(EngineConfig(base_path=base, adapter_cache_path=cache, **chosen), fetcher)


def request(name: str, prompt: Sequence[int], adapter: str | None = None, **sampling: Any) -> Request:
    """Return a greedy request, by default of at most 16 tokens, for the adapter called `adapter`."""
    chosen: dict[str, Any] = {"temperature": 0.0, "max_tokens": 16, **sampling}
    digest = None if adapter is None else digest_of(adapter)
    return Request(name, tuple(prompt), SamplingParams(**chosen), digest)


def run_all(engine: Engine, *, timeout_seconds: float = 60.0) -> dict[str, list[TokenEvent]]:
    """Step `engine` until nothing is alive; return the events of each request, in order."""
    events: dict[str, list[TokenEvent]] = {}
    deadline = time.monotonic() + timeout_seconds
    while engine.has_work:
        assert time.monotonic() < deadline, "the engine does not come to an end"
        if not engine.can_progress:
            time.sleep(0.001)
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def tokens_of(events: Sequence[TokenEvent], index: int = 0) -> list[int]:
    """Return the tokens of one sequence."""
    return [token for event in events if event.index == index for token in event.token_ids]


def text_of(events: Sequence[TokenEvent], index: int = 0) -> str:
    """Return the text of one sequence."""
    return "".join(event.text for event in events if event.index == index)


class Reference:
    """transformers and PEFT, one request at a time: the slow twin of the engine."""

    def __init__(
        self, base: Path, adapters: Mapping[str, Path], *, nf4: bool = False, device: str = "cpu"
    ) -> None:
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
            device_map={"": device},
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        self._model = load_peft_adapters(model, adapters)

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], adapter: str | None, max_tokens: int) -> list[int]:
        """Return the greedy continuation of `prompt`, the end-of-sequence token included."""
        output = self._call(adapter, "generate", max_new_tokens=max_tokens, do_sample=False, prompt=prompt)
        return [int(token) for token in output[0, len(prompt) :]]

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], adapter: str | None) -> torch.Tensor:
        """Return the logits [tokens, vocabulary] over `prompt`."""
        result = self._call(adapter, "__call__", prompt=prompt).logits[0]
        assert isinstance(result, torch.Tensor)
        return result

    def _call(self, adapter: str | None, method: str, *, prompt: Sequence[int], **arguments: Any) -> Any:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **arguments}
        if adapter is None:
            with self._model.disable_adapter():
                return getattr(self._model, method)(**inputs)
        self._model.set_adapter(adapter)
        return getattr(self._model, method)(**inputs)


class PlainPages:
    """KV blocks of one byte without anything behind them; notes what is released."""

    block_bytes = 1

    def __init__(self, num_blocks: int, extent_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.extent_blocks = extent_blocks
        self.released: list[int] = []

    def release(self, extent: int) -> None:
        self.released.append(extent)
