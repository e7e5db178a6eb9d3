"""The header of a safetensors file, read strictly and without loading a single tensor.

Layout: eight bytes, little-endian, give the length of a JSON object; the object maps tensor names to dtype,
shape and `data_offsets` (begin, end) counted from the end of the header; then the bytes of the tensors,
without holes.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from services.common.adapter_format.limits import DEFAULT_LIMITS
from services.common.adapter_format.strict_json import JsonFault, StrictJsonError, parse_object
from services.common.errors import InvalidArgument

FIELD = "weights"

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

_LENGTH_BYTES = 8
_HEADER_DEPTH = 3
_MAX_DIMENSIONS = 8
# An entry, its dtype, two lists, and the numbers in them: two offsets and two sizes of a matrix.
_TENSOR_VALUES = 8
_METADATA_VALUES = 1000
_METADATA = "__metadata__"
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
# The upper half of a length below 4 GiB, and the first byte of the header.
_END_OF_LENGTH = b"\0\0\0\0{"
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive (PyTorch saves those)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `begin` is its offset in the file in bytes, `nbytes` its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of one file, in the order of their bytes, and the text pairs the writer added."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path, *, max_header_bytes: int = DEFAULT_LIMITS.max_header_bytes) -> SafetensorsHeader:
    """Return the header of the file at `path`.

    Raises:
        InvalidArgument: `missing_file` (empty), `not_safetensors`, `header_too_large`, `header_not_utf8`,
            `header_bad_json`, `duplicate_tensor`, `bad_dtype`, `bad_shape` or `bad_offsets`.
    """
    with path.open("rb") as file:
        return read_header_from(file, max_header_bytes=max_header_bytes)


def read_header_from(
    file: BinaryIO, *, max_header_bytes: int, max_tensors: int | None = None
) -> SafetensorsHeader:
    """As `read_header`, from an open seekable file; more than `max_tensors` are `header_bad_json` too."""
    file_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(_LENGTH_BYTES + 1)
    header_bytes = _header_length(start, file_bytes, max_header_bytes)
    file.seek(_LENGTH_BYTES)
    entries = _parse(file.read(header_bytes), max_tensors)
    metadata = _metadata(entries.pop(_METADATA, {}))
    data_begin = _LENGTH_BYTES + header_bytes
    tensors = sorted(
        (_tensor(name, entry, data_begin) for name, entry in entries.items()),
        key=lambda tensor: (tensor.begin, tensor.nbytes),
    )
    _check_layout(tensors, data_begin, file_bytes)
    return SafetensorsHeader(tuple(tensors), metadata, file_bytes)


def _header_length(start: bytes, file_bytes: int, max_header_bytes: int) -> int:
    if file_bytes == 0:
        raise InvalidArgument("missing_file", "The weights file is empty.", field=FIELD)
    for magic, kind in _OTHER_FORMATS.items():
        # A length may begin with the same bytes: 1152 is 80 04 and six zeros.
        if start.startswith(magic) and start[_LENGTH_BYTES // 2 :] != _END_OF_LENGTH:
            raise InvalidArgument("not_safetensors", f"The weights file is {kind}.", field=FIELD)
    if len(start) < _LENGTH_BYTES or (
        len(start) > _LENGTH_BYTES and start[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{"
    ):
        raise InvalidArgument("not_safetensors", "The weights file is not a safetensors file.", field=FIELD)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    limit = min(max_header_bytes, file_bytes - _LENGTH_BYTES)
    if length > limit:
        raise InvalidArgument(
            "header_too_large",
            f"The safetensors header claims {length} bytes; at most {limit} are possible here.",
            field=FIELD,
            value=length,
            limit=limit,
        )
    return length


def _parse(data: bytes, max_tensors: int | None) -> dict[str, Any]:
    max_values = None if max_tensors is None else max_tensors * _TENSOR_VALUES + _METADATA_VALUES
    try:
        return parse_object(data, max_depth=_HEADER_DEPTH, max_values=max_values)
    except StrictJsonError as error:
        if error.fault is JsonFault.NOT_UTF8:
            raise InvalidArgument(
                "header_not_utf8", f"The safetensors header is {error}.", field=FIELD
            ) from error
        if error.fault is JsonFault.DUPLICATE_KEY and error.top_level:
            message = f"Tensor {error.key[:80]!r} stands twice in the safetensors header."
            raise InvalidArgument("duplicate_tensor", message, field=FIELD, value=error.key) from error
        raise InvalidArgument("header_bad_json", f"The safetensors header: {error}.", field=FIELD) from error


def _metadata(entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InvalidArgument("header_bad_json", "__metadata__ must map text to text.", field=FIELD)
    return dict(entry)


def _tensor(name: str, entry: object, data_begin: int) -> TensorInfo:
    if not _TENSOR_NAME.fullmatch(name):
        raise InvalidArgument(
            "unexpected_tensor", "A tensor has a name that no model uses.", field=FIELD, value=name
        )
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        message = f"Tensor {name} must have exactly dtype, shape and data_offsets."
        raise InvalidArgument("header_bad_json", message, field=FIELD, value=name)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InvalidArgument("bad_dtype", f"Tensor {name} has an unknown dtype.", field=FIELD, value=dtype)
    shape = _naturals(entry["shape"])
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        message = f"The shape of tensor {name} is not a list of at most {_MAX_DIMENSIONS} sizes."
        raise InvalidArgument("bad_shape", message, field=FIELD, value=entry["shape"])
    offsets = _naturals(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        message = f"Tensor {name} has impossible data_offsets."
        raise InvalidArgument("bad_offsets", message, field=FIELD, value=entry["data_offsets"])
    begin, end = offsets
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        message = f"Tensor {name}: {dtype} {list(shape)} does not take the {end - begin} bytes it is given."
        raise InvalidArgument("bad_shape", message, field=FIELD, value=list(shape))
    return TensorInfo(name, dtype, shape, data_begin + begin, end - begin)


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and item >= 0 for item in value):
        return None
    return tuple(value)


def _check_layout(tensors: list[TensorInfo], data_begin: int, file_bytes: int) -> None:
    expected = data_begin
    for tensor in tensors:
        if tensor.begin != expected:
            fault = "overlaps the tensor before it" if tensor.begin < expected else "leaves a hole before it"
            raise InvalidArgument(
                "bad_offsets", f"Tensor {tensor.name} {fault}.", field=FIELD, value=tensor.name
            )
        expected += tensor.nbytes
    if expected != file_bytes:
        message = f"The tensors end at byte {expected}, the file at byte {file_bytes}."
        raise InvalidArgument("bad_offsets", message, field=FIELD, value=expected, limit=file_bytes)
