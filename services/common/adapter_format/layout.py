"""Which tensor is which part of an adapter, by the names that PEFT gives them.

An adapted layer `M` has `base_model.model.M.lora_A.weight` and `.lora_B.weight`, an adapted input embedding
`.lora_embedding_A` [rank, vocabulary] and `.lora_embedding_B` [hidden, rank]. Three kinds of adapter have
more: `lora+bias` the trained biases `.lora_B.bias` (added to y, times the scale) or `.base_layer.bias` (in
place of the base's), `lora+scale` the magnitudes `.lora_magnitude_vector` (DoRA, Liu et al. 2024, equation
5), and `head` a whole layer `base_model.model.score.weight` (or `classifier`, or `lm_head`), with a bias
perhaps.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.adapter_format.config import LoraConfig
from services.common.adapter_format.limits import AdapterLimits
from services.common.adapter_format.safetensors_header import FIELD, TensorInfo
from services.common.adapter_format.summary import AdapterKind
from services.common.adapter_format.targeting import HEADS
from services.common.errors import InvalidArgument, ResourceExhausted

PREFIX = "base_model.model."

# Parts of tensor names that tell which unsupported feature wrote them.
_FEATURES = {
    ".modules_to_save.": "whole layers besides an output head",
    ".token_adapter.": "trainable tokens",
}


class Part(enum.Enum):
    """A tensor of an adapted layer, by the end of its name."""

    A = ".lora_A.weight"
    B = ".lora_B.weight"
    B_BIAS = ".lora_B.bias"
    BASE_BIAS = ".base_layer.bias"
    MAGNITUDE = ".lora_magnitude_vector"


_ENDS = {part.value: part for part in Part}
# An embedding is a linear layer of one-hot rows, so its A and B have the same places.
_EMBEDDING_ENDS = {".lora_embedding_A": Part.A, ".lora_embedding_B": Part.B}

Layer = dict[Part, TensorInfo]

_RULED_OUT = "belongs to a layer that target_modules, exclude_modules or layers_to_transform rule out"
_HEAD_TENSORS = {f"{PREFIX}{name}.{end}": name for name in HEADS for end in ("weight", "bias")}
_KINDS = {
    Part.B_BIAS: AdapterKind.LORA_BIAS,
    Part.BASE_BIAS: AdapterKind.LORA_BIAS,
    Part.MAGNITUDE: AdapterKind.LORA_SCALE,
}


@dataclass(frozen=True, slots=True)
class Head:
    """The tensors of an output head."""

    name: str
    weight: TensorInfo
    bias: TensorInfo | None


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a file, sorted: the layers by name, those that are embeddings, and the output head where
    there is one.
    """

    kind: AdapterKind
    layers: dict[str, Layer]
    embeddings: frozenset[str]
    head: Head | None


def sort_tensors(tensors: tuple[TensorInfo, ...], config: LoraConfig, limits: AdapterLimits) -> Layout:
    """Return what `tensors` are, by their names alone.

    Raises:
        InvalidArgument: `unexpected_tensor` where the config does not announce one, `missing_tensor`, or
            `unsupported_feature`.
        ResourceExhausted: `too_large` above `limits.max_modules`.
    """
    layers: dict[str, Layer] = {}
    embeddings: dict[str, Layer] = {}
    head_tensors: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if (found := _layer_and_part(tensor.name, _ENDS)) is not None:
            layers.setdefault(found[0], {})[found[1]] = tensor
        elif (found := _layer_and_part(tensor.name, _EMBEDDING_ENDS)) is not None:
            embeddings.setdefault(found[0], {})[found[1]] = tensor
        elif tensor.name in _HEAD_TENSORS:
            head_tensors[tensor.name] = tensor
        else:
            raise _refused(tensor.name, config)
    if len(layers) + len(embeddings) > limits.max_modules:
        raise _too_many(len(layers) + len(embeddings), limits)
    for module, layer in embeddings.items():
        _check_embedding(module, layer, layers, config)
    for module, layer in layers.items():
        _check_parts(module, layer, config)
    head = _head(head_tensors, config)
    return Layout(_kind(layers, head), layers | embeddings, frozenset(embeddings), head)


def _layer_and_part(name: str, ends: Mapping[str, Part]) -> tuple[str, Part] | None:
    for end, part in ends.items():
        if name.endswith(end) and name.startswith(PREFIX):
            module = name[len(PREFIX) : -len(end)]
            return (module, part) if module else None
    return None


def _refused(name: str, config: LoraConfig) -> InvalidArgument:
    for part, feature in _FEATURES.items():
        if part in name:
            message = f"Tensor {name} belongs to a feature that is not supported: {feature}."
            return InvalidArgument("unsupported_feature", message, field=FIELD, value=name)
    if config.base_bias and name.endswith(".bias"):
        message = f"Tensor {name} is the bias of a layer that is not adapted; those are not supported."
        return InvalidArgument("unsupported_feature", message, field=FIELD, value=name)
    if name.endswith(".base_layer.weight"):
        return _unexpected(name, "is the base's own; save the adapter with save_embedding_layers=False")
    return _unexpected(name, "is not part of a LoRA adapter")


def _check_embedding(module: str, layer: Layer, layers: Mapping[str, Layer], config: LoraConfig) -> None:
    tensor = next(iter(layer.values()))
    if module in layers or config.use_dora:
        feature = "use_dora of an embedding" if config.use_dora else "an embedding adapted as a linear layer"
        message = f"Tensor {tensor.name} belongs to a feature that is not supported: {feature}."
        raise InvalidArgument("unsupported_feature", message, field=FIELD, value=tensor.name)
    if not config.targeting.includes_embedding(module):
        raise _unexpected(tensor.name, _RULED_OUT)
    for end, part in _EMBEDDING_ENDS.items():
        if part not in layer:
            raise _missing(f"{PREFIX}{module}{end}")


def _check_parts(module: str, layer: Layer, config: LoraConfig) -> None:
    if not config.targeting.includes(module):
        raise _unexpected(next(iter(layer.values())).name, _RULED_OUT)
    wanted = {Part.A: True, Part.B: True, Part.B_BIAS: config.lora_bias, Part.MAGNITUDE: config.use_dora}
    for part, is_wanted in wanted.items():
        if is_wanted and part not in layer:
            raise _missing(f"{PREFIX}{module}{part.value}")
        if part in layer and not is_wanted:
            setting = "lora_bias" if part is Part.B_BIAS else "use_dora"
            raise _unexpected(layer[part].name, f"is there although {setting} is false")
    if Part.BASE_BIAS in layer and not config.base_bias:
        raise _unexpected(layer[Part.BASE_BIAS].name, 'is there although bias is "none"')


def _head(tensors: dict[str, TensorInfo], config: LoraConfig) -> Head | None:
    names = {_HEAD_TENSORS[name] for name in tensors}
    for name in tensors:
        if _HEAD_TENSORS[name] not in config.heads:
            raise _unexpected(name, "is a layer that modules_to_save does not name")
    if len(names) > 1:
        raise InvalidArgument(
            "unsupported_feature",
            "An adapter has one output head.",
            field=FIELD,
            value=sorted(names),
            limit=1,
        )
    if not config.heads:
        return None
    head = names.pop() if names else config.heads[-1]
    weight = tensors.get(f"{PREFIX}{head}.weight")
    if weight is None:
        raise _missing(f"{PREFIX}{head}.weight")
    return Head(head, weight, tensors.get(f"{PREFIX}{head}.bias"))


def _kind(layers: dict[str, Layer], head: Head | None) -> AdapterKind:
    kinds = {_KINDS[part] for layer in layers.values() for part in layer if part in _KINDS}
    if head is not None:
        kinds.add(AdapterKind.HEAD)
    if len(kinds) > 1:
        both = " and ".join(sorted(kind.value for kind in kinds))
        message = f"The adapter is {both} at once; a version has one kind."
        raise InvalidArgument("unsupported_feature", message, field=FIELD, value=both, limit=1)
    return kinds.pop() if kinds else AdapterKind.LORA


def _missing(name: str) -> InvalidArgument:
    return InvalidArgument("missing_tensor", f"Tensor {name} is missing.", field=FIELD, value=name)


def _unexpected(name: str, why: str) -> InvalidArgument:
    return InvalidArgument("unexpected_tensor", f"Tensor {name} {why}.", field=FIELD, value=name)


def _too_many(count: int, limits: AdapterLimits) -> ResourceExhausted:
    return ResourceExhausted(
        "too_large",
        f"The adapter changes {count} layers; the limit is {limits.max_modules}.",
        field=FIELD,
        value=count,
        limit=limits.max_modules,
        final=True,
    )
