"""A scan of the values of a weights file, chunk by chunk."""

from __future__ import annotations

import math
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from services.common.adapter_format.safetensors_header import FIELD, TensorInfo
from services.common.errors import InvalidArgument

_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FLOAT_DTYPES = frozenset(_STORED)


# Few enough that a sum of their squares in float32 is good to three digits and stays in the cache.
_PIECE_VALUES = 16 * 1024
_SMALLEST_TRUSTED = 1e-20


def frobenius_norm(file: BinaryIO, tensor: TensorInfo, *, chunk_bytes: int) -> float:
    """Return sqrt(sum of squares) of `tensor` to three digits, reading at most `chunk_bytes` at a time.

    Raises:
        InvalidArgument: `non_finite_weights` where a value is NaN or infinite.
    """
    file.seek(tensor.begin)
    remaining = tensor.nbytes
    sum_of_squares = 0.0
    while remaining:
        data = file.read(min(remaining, chunk_bytes))
        stored = np.frombuffer(data, dtype=_STORED[tensor.dtype])
        for start in range(0, stored.size, _PIECE_VALUES):
            sum_of_squares += _sum_of_squares(_as_float32(stored[start : start + _PIECE_VALUES]), tensor)
        remaining -= len(data)
    return math.sqrt(sum_of_squares)


def _sum_of_squares(values: npt.NDArray[np.float32], tensor: TensorInfo) -> float:
    # NaN and infinity come through the sum, so one pass checks and adds; no BLAS, hence no threads.
    quick = float(np.einsum("i,i->", values, values))
    if _SMALLEST_TRUSTED < quick < math.inf:
        return quick
    if not np.isfinite(values).all():
        message = f"Tensor {tensor.name} holds NaN or infinite values."
        raise InvalidArgument("non_finite_weights", message, field=FIELD, value=tensor.name)
    wide = values.astype(np.float64)
    return float(np.einsum("i,i->", wide, wide))


def _as_float32(stored: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    if stored.dtype != np.uint16:
        return stored.astype(np.float32, copy=False)
    # bfloat16 is the upper half of a float32.
    halves = np.zeros(2 * stored.size, dtype="<u2")
    halves[1::2] = stored
    return halves.view("<f4")
