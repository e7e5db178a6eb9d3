"""The base in the form it is served in, with a trainable LoRA on it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.common.base_loading import load_base_model
from services.common.fingerprint import Quantization
from services.trainer.spec import TrainingSpec

_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """Where a base lies and in which form it is trained on."""

    name: str
    path: Path
    quantization: Quantization


class AdapterModel:
    """A frozen base with one trainable LoRA.

    The base keeps the values it is served with: nothing of it is cast or merged. (PEFT's k-bit preparation
    would cast 16-bit embeddings and norms to float32, which serving does not do.) LoRA weights are float32.
    """

    def __init__(self, peft_model: PeftModel, pad_id: int) -> None:
        self.model: Any = peft_model
        self.pad_id = pad_id

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        device: torch.device = self.model.device
        return device

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trainable weights by name, sorted by name."""
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: found[name] for name in sorted(found)}

    def logits(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return float32 logits [rows, len(positions), vocabulary] at the given positions of every row."""
        output = self.model(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask.to(self.device),
            logits_to_keep=positions.to(self.device),
            use_cache=False,
        )
        logits: torch.Tensor = output.logits
        return logits.float()

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Leave the LoRA out for the body."""
        with self.model.disable_adapter():
            yield

    def save(self, folder: Path, base_name: str) -> None:
        """Write the two files of a PEFT adapter to `folder`; the same weights give the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name.replace(f".{_ADAPTER}.", "."): parameter.detach().to("cpu", torch.float32).contiguous()
            for name, parameter in self.parameters().items()
        }
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = self.model.peft_config[_ADAPTER].to_dict()
        config |= {"base_model_name_or_path": base_name, "inference_mode": True}
        text = json.dumps(_plain(config), indent=2, sort_keys=True, allow_nan=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_base(base: BaseFolder, device: torch.device) -> Any:
    """Return the base as a frozen transformers causal model, as inference loads it."""
    return load_base_model(base.path, base.quantization, device=device, attention="sdpa")


def attach_adapter(base_model: Any, spec: TrainingSpec, *, seed: int, pad_id: int) -> AdapterModel:
    """Return `base_model` with a new LoRA drawn from `seed`; B is zero, so it begins as the base."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        use_rslora=spec.method == "rslora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT asks transformers in a way that transformers has deprecated.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base_model, config)
    if spec.gradient_checkpointing:
        base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad), "LoRA is float32"
    return AdapterModel(model, pad_id)


def _plain(value: Any) -> Any:
    """Return PEFT's configuration as JSON, with sets in order."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
