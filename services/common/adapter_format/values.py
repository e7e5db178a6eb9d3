"""A scan of the values of a weights file, chunk by chunk."""

from __future__ import annotations

import math
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from services.common.adapter_format.safetensors_header import FIELD, TensorInfo
from services.common.errors import InvalidArgument

FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})


def frobenius_norm(file: BinaryIO, tensor: TensorInfo, *, chunk_bytes: int) -> float:
    """Return sqrt(sum of squares) of `tensor`, reading at most `chunk_bytes` at a time.

    Raises:
        InvalidArgument: `non_finite_weights` where a value is NaN or infinite.
    """
    file.seek(tensor.begin)
    remaining = tensor.nbytes
    sum_of_squares = 0.0
    while remaining:
        data = file.read(min(remaining, chunk_bytes))
        values = _as_float32(data, tensor.dtype)
        if not np.isfinite(values).all():
            message = f"Tensor {tensor.name} holds NaN or infinite values."
            raise InvalidArgument("non_finite_weights", message, field=FIELD, value=tensor.name)
        wide = values.astype(np.float64)
        sum_of_squares += float(np.dot(wide, wide))
        remaining -= len(data)
    return math.sqrt(sum_of_squares)


def _as_float32(data: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4")
    if dtype == "F16":
        return np.frombuffer(data, dtype="<f2").astype(np.float32)
    assert dtype == "BF16", dtype
    # bfloat16 is the upper half of a float32.
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
