"""Reads the two files of a PEFT LoRA adapter and refuses all that would not be served exactly as written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from services.common.adapter_format.config import LoraConfig, parse_config
from services.common.adapter_format.layout import Head, Layer, Layout, Part, sort_tensors
from services.common.adapter_format.limits import DEFAULT_LIMITS, AdapterLimits
from services.common.adapter_format.safetensors_header import FIELD, TensorInfo, read_header_from
from services.common.adapter_format.summary import AdapterSummary, LoraModule, OutputHead
from services.common.adapter_format.values import FLOAT_DTYPES, frobenius_norm
from services.common.errors import InvalidArgument, ResourceExhausted

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".7z", ".rar")
_HASH_CHUNK_BYTES = 1024 * 1024

ModuleTable = Mapping[str, tuple[int, int]]


def read_adapter(
    config: bytes,
    weights: Path,
    *,
    base_modules: ModuleTable | None = None,
    weights_digest: str | None = None,
    limits: AdapterLimits = DEFAULT_LIMITS,
) -> AdapterSummary:
    """Check an adapter and return what it is, in memory bounded by the header and `limits.scan_chunk_bytes`.

    Args:
        config: the bytes of `adapter_config.json`.
        weights: the path of the safetensors file.
        base_modules: name -> (in_features, out_features) of what may be adapted in the base: linear layers,
            embeddings and its output head; checked where given.
        weights_digest: the digest of the file, from a caller that has just hashed it; else it is hashed here.
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
        header = read_header_from(
            file, max_header_bytes=limits.max_header_bytes, max_tensors=limits.max_tensors
        )
        layout = sort_tensors(header.tensors, settings, limits)
        dtype = _check_dtypes(layout)
        modules = [
            _module(name, layer, name in layout.embeddings, settings, base_modules)
            for name, layer in sorted(layout.layers.items())
        ]
        head = _output_head(layout.head, base_modules or {})
        changes_something = _scan(file, modules, layout, limits)
        digest = _digest_of(file) if weights_digest is None else weights_digest
    return AdapterSummary(
        kind=layout.kind,
        modules=tuple(modules),
        head=head,
        targets=tuple(sorted({module.name.rpartition(".")[2] for module in modules})),
        dtype=dtype,
        config_bytes=len(config),
        weights_bytes=weights_bytes,
        config_digest="sha256:" + hashlib.sha256(config).hexdigest(),
        weights_digest=digest,
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


def _check_dtypes(layout: Layout) -> str:
    for tensor in _tensors(layout):
        if tensor.dtype not in FLOAT_DTYPES:
            raise _bad_dtype(tensor, "F32, F16 or BF16")
    low_rank = [layer[part] for layer in layout.layers.values() for part in (Part.A, Part.B)]
    for tensor in low_rank:
        if tensor.dtype != low_rank[0].dtype:
            raise _bad_dtype(tensor, low_rank[0].dtype)
    return low_rank[0].dtype if low_rank else "F32"


def _tensors(layout: Layout) -> Iterator[TensorInfo]:
    for layer in layout.layers.values():
        yield from layer.values()
    if layout.head is not None:
        yield layout.head.weight
        if layout.head.bias is not None:
            yield layout.head.bias


def _module(
    name: str, layer: Layer, is_embedding: bool, settings: LoraConfig, base_modules: ModuleTable | None
) -> LoraModule:
    a, b = layer[Part.A], layer[Part.B]
    for tensor in (a, b):
        _check_matrix(tensor)
    rank = settings.rank_of(name)
    for tensor, got in ((a, a.shape[0]), (b, b.shape[1])):
        if got != rank:
            message = f"Tensor {tensor.name} has rank {got}, the config says {rank}."
            raise InvalidArgument("rank_mismatch", message, field=FIELD, value=got, limit=rank)
    vectors = [tensor for part, tensor in layer.items() if part not in (Part.A, Part.B)]
    for vector in vectors:
        _check_vector(vector, b.shape[0])
    module = LoraModule(
        name,
        rank,
        in_features=a.shape[1],
        out_features=b.shape[0],
        scale=settings.scale_of(name),
        num_vector_parameters=len(vectors) * b.shape[0],
        is_embedding=is_embedding,
    )
    if base_modules is not None:
        _check_base(module, base_modules)
    return module


def _output_head(head: Head | None, base_modules: ModuleTable) -> OutputHead | None:
    if head is None:
        return None
    _check_matrix(head.weight)
    out_features, in_features = head.weight.shape
    if head.bias is not None:
        _check_vector(head.bias, out_features)
    # A classifier's head is not in the base, so it has any shape.
    if head.name in base_modules:
        _check_shape(head.name, (in_features, out_features), base_modules[head.name])
    return OutputHead(head.name, in_features, out_features, head.bias is not None)


def _check_matrix(tensor: TensorInfo) -> None:
    if len(tensor.shape) != 2 or 0 in tensor.shape:
        message = f"Tensor {tensor.name} has shape {list(tensor.shape)}; a matrix is needed."
        raise InvalidArgument("bad_shape", message, field=FIELD, value=list(tensor.shape))


def _check_vector(tensor: TensorInfo, length: int) -> None:
    if tensor.shape != (length,):
        message = f"Tensor {tensor.name} has shape {list(tensor.shape)}; its layer needs [{length}]."
        raise InvalidArgument("bad_shape", message, field=FIELD, value=list(tensor.shape), limit=[length])


def _check_base(module: LoraModule, base_modules: ModuleTable) -> None:
    expected = base_modules.get(module.name)
    if expected is None:
        what = "embedding" if module.is_embedding else "linear layer"
        message = f"The base has no {what} {module.name}."
        raise InvalidArgument("base_mismatch", message, field=FIELD, value=module.name)
    _check_shape(module.name, (module.in_features, module.out_features), expected)


def _check_shape(name: str, actual: tuple[int, int], expected: tuple[int, int]) -> None:
    if actual != expected:
        message = f"Layer {name}: the adapter is for (in, out) {actual}, the base has {expected}."
        raise InvalidArgument("base_mismatch", message, field=FIELD, value=actual, limit=expected)


def _scan(file: BinaryIO, modules: list[LoraModule], layout: Layout, limits: AdapterLimits) -> bool:
    """Check every value; return whether the adapter may change anything."""
    norms = {
        tensor.name: frobenius_norm(file, tensor, chunk_bytes=limits.scan_chunk_bytes)
        for tensor in sorted(_tensors(layout), key=lambda tensor: tensor.begin)
    }
    changes_something = False
    for module in modules:
        layer = layout.layers[module.name]
        delta_norm = module.scale * norms[layer[Part.A].name] * norms[layer[Part.B].name]
        _check_norm(delta_norm, f"Layer {module.name}: scale * |B| * |A|", limits)
        changes_something = changes_something or delta_norm > 0
        if Part.B_BIAS in layer:
            bias_norm = module.scale * norms[layer[Part.B_BIAS].name]
            _check_norm(bias_norm, f"Layer {module.name}: scale * |bias|", limits)
            changes_something = changes_something or bias_norm > 0
    # The base's own values are not at hand here, so what stands in their place counts as a change.
    for tensor in _replacing(layout):
        _check_norm(norms[tensor.name], f"Tensor {tensor.name}: its norm", limits)
        changes_something = True
    return changes_something


def _replacing(layout: Layout) -> Iterator[TensorInfo]:
    for layer in layout.layers.values():
        for part in (Part.BASE_BIAS, Part.MAGNITUDE):
            if part in layer:
                yield layer[part]
    if layout.head is not None:
        yield layout.head.weight
        if layout.head.bias is not None:
            yield layout.head.bias


def _check_norm(norm: float, what: str, limits: AdapterLimits) -> None:
    if norm > limits.max_delta_norm:
        message = f"{what} is {norm:.3g}; no trained adapter is above {limits.max_delta_norm:.3g}."
        raise InvalidArgument(
            "weights_out_of_range", message, field=FIELD, value=norm, limit=limits.max_delta_norm
        )


def _bad_dtype(tensor: TensorInfo, wanted: str) -> InvalidArgument:
    message = f"Tensor {tensor.name} is {tensor.dtype}; it must be {wanted}."
    return InvalidArgument("bad_dtype", message, field=FIELD, value=tensor.dtype, limit=wanted)


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
