"""Reads the two files of a PEFT LoRA adapter and refuses all that would not be served exactly as written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from services.common.adapter_format.config import LoraConfig, parse_config
from services.common.adapter_format.limits import DEFAULT_LIMITS, AdapterLimits
from services.common.adapter_format.patterns import is_target
from services.common.adapter_format.safetensors_header import FIELD, TensorInfo, read_header_from
from services.common.adapter_format.summary import AdapterKind, AdapterSummary, LoraModule
from services.common.adapter_format.values import FLOAT_DTYPES, frobenius_norm
from services.common.errors import InvalidArgument, ResourceExhausted

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

_PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
# Parts of tensor names that tell which unsupported feature wrote them.
_FEATURE_TENSORS = {
    ".lora_B.bias": AdapterKind.LORA_BIAS.value,
    ".lora_magnitude_vector": AdapterKind.LORA_SCALE.value,
    ".modules_to_save.": AdapterKind.HEAD.value,
    ".lora_embedding_": "embedding adapters",
    ".token_adapter.": "trainable tokens",
}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_HASH_CHUNK_BYTES = 1024 * 1024

ModuleTable = Mapping[str, tuple[int, int]]


def read_adapter(
    config: bytes,
    weights: Path,
    *,
    base_modules: ModuleTable | None = None,
    limits: AdapterLimits = DEFAULT_LIMITS,
) -> AdapterSummary:
    """Check an adapter and return what it is, in memory bounded by the header and `limits.scan_chunk_bytes`.

    Args:
        config: the bytes of `adapter_config.json`.
        weights: the path of the safetensors file.
        base_modules: name -> (in_features, out_features) of the base's linear layers; checked where given.
        limits: the largest sizes and values accepted.

    Raises:
        InvalidArgument, ResourceExhausted: with the reasons of `parse_config` and `read_header`, and
            `too_large`,
            `bad_dtype`, `bad_shape`, `unexpected_tensor`, `unsupported_feature`, `missing_tensor`,
            `rank_mismatch`, `rank_too_large`, `base_mismatch`, `non_finite_weights` or
            `weights_out_of_range`.
    """
    settings = parse_config(config, limits)
    with weights.open("rb") as file:
        weights_bytes = weights.stat().st_size
        if weights_bytes > limits.max_weights_bytes:
            raise _too_large(weights_bytes, limits)
        header = read_header_from(file, max_header_bytes=limits.max_header_bytes)
        pairs = _pair_up(header.tensors, limits)
        dtype = _common_dtype(header.tensors)
        modules = [_module(name, pair, settings, base_modules) for name, pair in sorted(pairs.items())]
        changes_something = _scan(file, modules, pairs, limits)
        weights_digest = _digest_of(file)
    return AdapterSummary(
        kind=AdapterKind.LORA,
        modules=tuple(modules),
        targets=tuple(sorted({module.name.rpartition(".")[2] for module in modules})),
        dtype=dtype,
        config_bytes=len(config),
        weights_bytes=weights_bytes,
        config_digest="sha256:" + hashlib.sha256(config).hexdigest(),
        weights_digest=weights_digest,
        declared_base=settings.declared_base,
        warnings=() if changes_something else ("noop_adapter",),
    )


def read_folder(
    folder: Path, *, base_modules: ModuleTable | None = None, limits: AdapterLimits = DEFAULT_LIMITS
) -> AdapterSummary:
    """As `read_adapter`, for a folder as PEFT's `save_pretrained` writes it; it may hold a README.md too.

    Raises:
        InvalidArgument, ResourceExhausted: as `read_adapter` and `check_file_names`.
    """
    check_file_names([path.name for path in folder.iterdir() if path.name != CARD_FILE])
    with (folder / CONFIG_FILE).open("rb") as file:
        config = file.read(limits.max_config_bytes + 1)
    return read_adapter(config, folder / WEIGHTS_FILE, base_modules=base_modules, limits=limits)


def check_file_names(names: Collection[str]) -> None:
    """Refuse any set of files but the two of an adapter.

    Raises:
        InvalidArgument: `unsafe_weight_format` (pickles), `archives_not_supported`, `unexpected_file` or
            `missing_file`.
    """
    for name in sorted(names):
        shown = name[:120]
        if name in (CONFIG_FILE, WEIGHTS_FILE):
            continue
        if name.lower().endswith(_PICKLE_SUFFIXES):
            message = f"{shown!r} may hold a pickle, which can run code. Save the adapter as {WEIGHTS_FILE}."
            raise InvalidArgument("unsafe_weight_format", message, field="files", value=shown)
        if name.lower().endswith(_ARCHIVE_SUFFIXES):
            message = f"{shown!r} is an archive; send {CONFIG_FILE} and {WEIGHTS_FILE} themselves."
            raise InvalidArgument("archives_not_supported", message, field="files", value=shown)
        message = f"{shown!r} is neither {CONFIG_FILE} nor {WEIGHTS_FILE}."
        raise InvalidArgument("unexpected_file", message, field="files", value=shown)
    for wanted in (CONFIG_FILE, WEIGHTS_FILE):
        if wanted not in names:
            raise InvalidArgument("missing_file", f"{wanted} is missing.", field="files", value=wanted)


def _pair_up(tensors: tuple[TensorInfo, ...], limits: AdapterLimits) -> dict[str, dict[str, TensorInfo]]:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        module, side = _module_and_side(tensor.name)
        pairs.setdefault(module, {})[side] = tensor
    if len(pairs) > limits.max_modules:
        raise ResourceExhausted(
            "too_large",
            f"The adapter changes {len(pairs)} layers; the limit is {limits.max_modules}.",
            field=FIELD,
            value=len(pairs),
            limit=limits.max_modules,
            final=True,
        )
    for module, pair in pairs.items():
        for side in ("A", "B"):
            if side not in pair:
                name = f"{_PREFIX}{module}.lora_{side}.weight"
                raise InvalidArgument("missing_tensor", f"Tensor {name} is missing.", field=FIELD, value=name)
    return pairs


def _module_and_side(name: str) -> tuple[str, str]:
    for part, feature in _FEATURE_TENSORS.items():
        if part in name:
            message = f"Tensor {name} belongs to a feature that is not supported: {feature}."
            raise InvalidArgument("unsupported_feature", message, field=FIELD, value=name)
    for suffix, side in _SIDES.items():
        module = name.removeprefix(_PREFIX).removesuffix(suffix)
        if name == _PREFIX + module + suffix and module:
            return module, side
    raise InvalidArgument(
        "unexpected_tensor", f"Tensor {name} is not part of a LoRA adapter.", field=FIELD, value=name
    )


def _common_dtype(tensors: tuple[TensorInfo, ...]) -> str:
    for tensor in tensors:
        if tensor.dtype not in FLOAT_DTYPES or tensor.dtype != tensors[0].dtype:
            message = f"Tensor {tensor.name} is {tensor.dtype}; all must be one of F32, F16 and BF16."
            raise InvalidArgument(
                "bad_dtype", message, field=FIELD, value=tensor.dtype, limit="F32, F16 or BF16"
            )
    return tensors[0].dtype if tensors else "F32"


def _module(
    name: str, pair: dict[str, TensorInfo], settings: LoraConfig, base_modules: ModuleTable | None
) -> LoraModule:
    a, b = pair["A"], pair["B"]
    if not is_target(settings.target_modules, name):
        message = f"Tensor {a.name} belongs to a layer that target_modules does not name."
        raise InvalidArgument("unexpected_tensor", message, field=FIELD, value=a.name)
    for tensor in (a, b):
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            message = f"Tensor {tensor.name} has shape {list(tensor.shape)}; a matrix is needed."
            raise InvalidArgument("bad_shape", message, field=FIELD, value=list(tensor.shape))
    rank = settings.rank_of(name)
    for tensor, got in ((a, a.shape[0]), (b, b.shape[1])):
        if got != rank:
            message = f"Tensor {tensor.name} has rank {got}, the config says {rank}."
            raise InvalidArgument("rank_mismatch", message, field=FIELD, value=got, limit=rank)
    module = LoraModule(name, rank, a.shape[1], b.shape[0], settings.scale_of(name))
    if base_modules is not None:
        _check_base(module, base_modules)
    return module


def _check_base(module: LoraModule, base_modules: ModuleTable) -> None:
    expected = base_modules.get(module.name)
    actual = (module.in_features, module.out_features)
    if expected is None:
        message = f"The base has no linear layer {module.name}."
        raise InvalidArgument("base_mismatch", message, field=FIELD, value=module.name)
    if actual != expected:
        message = f"Layer {module.name}: the adapter is for (in, out) {actual}, the base has {expected}."
        raise InvalidArgument("base_mismatch", message, field=FIELD, value=actual, limit=expected)


def _scan(
    file: BinaryIO, modules: list[LoraModule], pairs: dict[str, dict[str, TensorInfo]], limits: AdapterLimits
) -> bool:
    """Check every value; return whether any module's A and B are both non-zero."""
    changes_something = False
    for module in modules:
        norms = [
            frobenius_norm(file, pairs[module.name][side], chunk_bytes=limits.scan_chunk_bytes)
            for side in ("A", "B")
        ]
        delta_norm = module.scale * norms[0] * norms[1]
        if delta_norm > limits.max_delta_norm:
            message = (
                f"Layer {module.name}: scale * |B| * |A| is {delta_norm:.3g}; no trained adapter is above "
                f"{limits.max_delta_norm:.3g}."
            )
            raise InvalidArgument(
                "weights_out_of_range", message, field=FIELD, value=delta_norm, limit=limits.max_delta_norm
            )
        changes_something = changes_something or delta_norm > 0
    return changes_something


def _digest_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return "sha256:" + digest.hexdigest()


def _too_large(weights_bytes: int, limits: AdapterLimits) -> ResourceExhausted:
    return ResourceExhausted(
        "too_large",
        f"The weights have {weights_bytes} bytes; the limit is {limits.max_weights_bytes}.",
        field=FIELD,
        value=weights_bytes,
        limit=limits.max_weights_bytes,
        final=True,
    )
