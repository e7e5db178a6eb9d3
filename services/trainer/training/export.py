"""What a trained update is published as: the two files of a PEFT adapter on the untouched base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE
from services.trainer.spec import TrainingSpec
from services.trainer.training.adapter import TrainableAdapter
from services.trainer.training.forms import Pair
from services.trainer.training.initialise import update_scale


@dataclass(frozen=True, slots=True)
class _Published:
    """One layer as plain LoRA: scale * B A, with the scale that the configuration says."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@torch.no_grad()
def export(adapter: TrainableAdapter, spec: TrainingSpec, folder: Path, base_name: str) -> float:
    """Write the update to `folder`; the same weights give the same bytes.

    Returns:
        The relative error of the published weight change against the trained one (Frobenius, worst layer).
    """
    scale = update_scale(spec)
    layers: dict[str, _Published] = {}
    worst = 0.0
    for name, form in sorted(adapter.forms.items()):
        pairs = form.pairs()
        magnitude = None if form.magnitude is None else form.magnitude.detach()
        layers[name] = _published(pairs, scale, magnitude)
        worst = max(worst, relative_error(pairs, [Pair(layers[name].a, layers[name].b, scale)]))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_tensors(layers), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _config(layers, spec, scale).to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    text = json.dumps(_plain(config), indent=2, sort_keys=True, allow_nan=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return worst


def relative_error(one: Sequence[Pair], other: Sequence[Pair]) -> float:
    """Return |one - other| / |one| (Frobenius) of two sums of pairs; 0 where the first is zero."""
    difference = [*one, *(Pair(pair.a, pair.b, -pair.scale) for pair in other)]
    whole = _norm(one)
    return _norm(difference) / whole if whole else 0.0


def _norm(pairs: Sequence[Pair]) -> float:
    """Return |sum of scale B A|, from the small factors of two QR decompositions in float64."""
    b = torch.cat([pair.b.double() * pair.scale for pair in pairs], dim=1)
    a = torch.cat([pair.a.double() for pair in pairs])
    return float(torch.linalg.norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T))


def _published(pairs: Sequence[Pair], scale: float, magnitude: Tensor | None) -> _Published:
    a = torch.cat([pair.a for pair in pairs])
    b = torch.cat([pair.b if pair.scale == scale else pair.b * (pair.scale / scale) for pair in pairs], dim=1)
    return _Published(a, b, magnitude)


def _tensors(layers: dict[str, _Published]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = layer.a
        tensors[f"{prefix}.lora_B.weight"] = layer.b
        if layer.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = layer.magnitude
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def _config(layers: dict[str, _Published], spec: TrainingSpec, scale: float) -> LoraConfig:
    """Return the configuration under which PEFT multiplies every layer's B A by `scale`."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    same = set(ranks.values())
    use_rslora = spec.method == "rslora"
    rank = same.pop() if len(same) == 1 else spec.rank
    other = {name: each for name, each in ranks.items() if each != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=_number(spec.alpha if use_rslora else scale * rank),
        rank_pattern=other,
        alpha_pattern={name: _number(scale * each) for name, each in other.items()},
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        use_rslora=use_rslora,
        use_dora=spec.method == "dora",
        lora_dropout=spec.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _number(value: float) -> Any:
    """Return a whole number as an integer, as PEFT's own files have it."""
    return int(value) if value == int(value) else value


def _plain(value: Any) -> Any:
    """Return PEFT's configuration as JSON, with sets in order."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
