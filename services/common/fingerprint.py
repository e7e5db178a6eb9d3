"""What identifies a base: its tensors, config, tokenizer, chat template and quantisation, as one digest.

An adapter trained on one set of base values is wrong on another, so it is bound to `BaseFingerprint.digest`.
Nothing
here needs torch: tensors are read as bytes.
"""

from __future__ import annotations

import enum
import hashlib
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from services.common.adapter_format.limits import GIB, MIB
from services.common.adapter_format.safetensors_header import TensorInfo, read_header
from services.common.adapter_format.strict_json import StrictJsonError, canonical_json, parse_object
from services.common.errors import InvalidArgument

# A big model has tens of thousands of tensors; its headers are ours, not a stranger's.
_MAX_HEADER_BYTES = 100 * MIB
_MAX_JSON_BYTES = GIB // 4
_JSON_DEPTH = 64
_CHUNK_BYTES = MIB

# Keys of config.json that record history or serving habits and do not shape the computation.
_IRRELEVANT_CONFIG_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config"}
)
# Layers that stay outside the decoder's projections: they are looked up or tied, not multiplied by adapters.
_NOT_TARGETS = frozenset(
    {"lm_head", "embed_tokens", "wte", "wpe", "embed_in", "embed_out", "embed_positions"}
)


class QuantizationType(enum.Enum):
    """How the linear weights of the base are stored on the device."""

    NONE = "none"
    NF4 = "nf4"
    FP4 = "fp4"


class ComputeDtype(enum.Enum):
    """The type that matrix products run in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True, slots=True)
class Quantization:
    """The stored form of the base's linear weights (QLoRA, Dettmers et al. 2023, section 3).

    Attributes:
        type: the 4-bit data type, or none.
        block_size: weights that share one scale; 0 when `type` is NONE.
        double_quantization: whether the scales are quantised too.
        compute_dtype: recorded, and no part of the fingerprint's digest: it changes rounding, not the 4-bit
            values.
    """

    type: QuantizationType
    block_size: int
    double_quantization: bool
    compute_dtype: ComputeDtype

    def __post_init__(self) -> None:
        if self.type is QuantizationType.NONE:
            if self.block_size != 0 or self.double_quantization:
                message = "Without quantization, block_size is 0 and double_quantization is off."
                raise InvalidArgument(
                    "bad_quantization", message, field="quantization", value=self.block_size
                )
        elif not 32 <= self.block_size <= 4096 or self.block_size & (self.block_size - 1):
            message = "block_size must be a power of two from 32 to 4096."
            raise InvalidArgument(
                "bad_quantization", message, field="quantization.block_size", value=self.block_size
            )

    @classmethod
    def nf4(cls, compute_dtype: ComputeDtype) -> Quantization:
        """NF4 with double quantisation, in the blocks that bitsandbytes makes of weights."""
        return cls(QuantizationType.NF4, 64, True, compute_dtype)

    @classmethod
    def none(cls, compute_dtype: ComputeDtype) -> Quantization:
        """Weights as loaded, in the compute type."""
        return cls(QuantizationType.NONE, 0, False, compute_dtype)


@dataclass(frozen=True)
class BaseFingerprint:
    """The digests that identify a base, each `sha256:<hex>`.

    Attributes:
        weights_digest: over name, dtype, shape and bytes of every tensor, by name; shards may be cut anyhow.
        config_digest: over the canonical JSON of config.json without the keys that do not shape the
            computation.
        tokenizer_digest: over the canonical JSON of tokenizer.json.
        chat_template_digest: over the template's text; the digest of nothing when there is none.
        quantization: the stored form of the linear weights.
    """

    weights_digest: str
    config_digest: str
    tokenizer_digest: str
    chat_template_digest: str
    quantization: Quantization

    @cached_property
    def digest(self) -> str:
        """Over all of the above but the compute type: what an adapter version is bound to."""
        quantization = self.quantization
        return _digest(
            canonical_json(
                {
                    "weights": self.weights_digest,
                    "config": self.config_digest,
                    "tokenizer": self.tokenizer_digest,
                    "chat_template": self.chat_template_digest,
                    "quantization": {
                        "type": quantization.type.value,
                        "block_size": quantization.block_size,
                        "double_quantization": quantization.double_quantization,
                    },
                }
            )
        )


def fingerprint_base(model_dir: Path, quantization: Quantization) -> BaseFingerprint:
    """Return the fingerprint of the model in `model_dir` served with `quantization`; reads every weight once.

    Raises:
        InvalidArgument: `missing_file` where weights, config.json or tokenizer.json are missing,
            `duplicate_tensor`
            where two shards hold the same tensor, `bad_config`, or the reasons of `read_header`.
    """
    return _fingerprint(model_dir, weights_digest(model_dir), quantization)


class FingerprintCache:
    """Remembers weights digests by path, size and modification time of every shard. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weights_digests: dict[tuple[tuple[str, int, int], ...], str] = {}

    def fingerprint(self, model_dir: Path, quantization: Quantization) -> BaseFingerprint:
        """As `fingerprint_base`, reading the weights only where a shard changed since the last call."""
        key = tuple(
            (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in _shards(model_dir)
        )
        with self._lock:
            known = self._weights_digests.get(key)
            if known is None:
                known = self._weights_digests[key] = weights_digest(model_dir)
        return _fingerprint(model_dir, known, quantization)


def weights_digest(model_dir: Path) -> str:
    """Return the SHA-256 over a line of JSON per tensor, by name: name, dtype, shape, digest of its bytes."""
    digest = hashlib.sha256()
    for path, tensor in _tensors(model_dir):
        with path.open("rb") as file:
            entry = [tensor.name, tensor.dtype, list(tensor.shape), _tensor_digest(file, tensor)]
        digest.update(canonical_json(entry) + b"\n")
    return "sha256:" + digest.hexdigest()


def linear_module_table(model_dir: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (in_features, out_features) of the linear layers of the decoder, from the headers alone.

    A linear layer is a two-dimensional `weight` that is neither an embedding nor the output head.
    """
    table: dict[str, tuple[int, int]] = {}
    for _, tensor in _tensors(model_dir):
        name, _, parameter = tensor.name.rpartition(".")
        if parameter == "weight" and len(tensor.shape) == 2 and name.rpartition(".")[2] not in _NOT_TARGETS:
            out_features, in_features = tensor.shape
            table[name] = (in_features, out_features)
    return table


def num_parameters(model_dir: Path) -> int:
    """Return the number of values in all tensors of `model_dir`; tied tensors stored once count once."""
    total = 0
    for _, tensor in _tensors(model_dir):
        size = 1
        for length in tensor.shape:
            size *= length
        total += size
    return total


def _fingerprint(model_dir: Path, weights: str, quantization: Quantization) -> BaseFingerprint:
    return BaseFingerprint(
        weights_digest=weights,
        config_digest=_config_digest(model_dir),
        tokenizer_digest=_digest(canonical_json(_read_json(model_dir / "tokenizer.json"))),
        chat_template_digest=_digest(_chat_template(model_dir).encode("utf-8")),
        quantization=quantization,
    )


def _tensors(model_dir: Path) -> list[tuple[Path, TensorInfo]]:
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in _shards(model_dir):
        for tensor in read_header(path, max_header_bytes=_MAX_HEADER_BYTES).tensors:
            if tensor.name in found:
                message = f"Tensor {tensor.name} stands in {found[tensor.name][0].name} and in {path.name}."
                raise InvalidArgument("duplicate_tensor", message, field="weights", value=tensor.name)
            found[tensor.name] = (path, tensor)
    return [found[name] for name in sorted(found)]


def _shards(model_dir: Path) -> list[Path]:
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise InvalidArgument("missing_file", f"{model_dir.name} holds no safetensors file.", field="weights")
    return shards


def _tensor_digest(file: BinaryIO, tensor: TensorInfo) -> str:
    digest = hashlib.sha256()
    file.seek(tensor.begin)
    remaining = tensor.nbytes
    while remaining:
        data = file.read(min(remaining, _CHUNK_BYTES))
        if not data:
            message = f"The file that holds tensor {tensor.name} shrank while it was read."
            raise InvalidArgument("bad_offsets", message, field="weights", value=tensor.name)
        digest.update(data)
        remaining -= len(data)
    return digest.hexdigest()


def _config_digest(model_dir: Path) -> str:
    config = _read_json(model_dir / "config.json")
    return _digest(
        canonical_json({key: value for key, value in config.items() if key not in _IRRELEVANT_CONFIG_KEYS})
    )


def _chat_template(model_dir: Path) -> str:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    tokenizer_config = model_dir / "tokenizer_config.json"
    if not tokenizer_config.is_file():
        return ""
    template = _read_json(tokenizer_config).get("chat_template", "")
    if not isinstance(template, str):
        message = "tokenizer_config.json must hold one chat template as text."
        raise InvalidArgument("bad_config", message, field="chat_template")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidArgument("missing_file", f"{path.name} is missing.", field=path.name)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InvalidArgument(
            "bad_config", f"{path.name} is too large.", field=path.name, limit=_MAX_JSON_BYTES
        )
    try:
        return parse_object(path.read_bytes(), max_depth=_JSON_DEPTH)
    except StrictJsonError as error:
        raise InvalidArgument("bad_config", f"{path.name}: {error}.", field=path.name) from error


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
