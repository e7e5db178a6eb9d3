"""The compiled kernels as Python calls them, and their structures, field by field as in the C sources."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import ClassVar

from services.inference.kernels.build import BuildError, build_library

logger = logging.getLogger(__name__)

MAX_PROJECTIONS = 3

_Pointer = ctypes.c_void_p
_Integer = ctypes.c_int64


class Projection(ctypes.Structure):
    """A linear layer of the base; without `weight` the adapters change what the output holds."""

    _fields_: ClassVar = [("weight", _Pointer), ("bias", _Pointer), ("out", _Integer), ("module", _Integer)]


class Layer(ctypes.Structure):
    """Projections of the same input."""

    _fields_: ClassVar = [
        ("in_features", _Integer),
        ("count", _Integer),
        ("projections", Projection * MAX_PROJECTIONS),
    ]


class Update(ctypes.Structure):
    """An adapter's update of one module: A [rank, in], B transposed [rank, out], gain [out], shift [out]."""

    _fields_: ClassVar = [
        ("a", _Pointer),
        ("b", _Pointer),
        ("gain", _Pointer),
        ("shift", _Pointer),
        ("rank", _Integer),
    ]


class Segment(ctypes.Structure):
    """Rows `start` to `end` use the adapter whose updates are at `table`."""

    _fields_: ClassVar = [("table", _Pointer), ("start", _Integer), ("end", _Integer)]


class Step(ctypes.Structure):
    """What the linear calls of one step have in common: who uses which adapter, and scratch memory."""

    _fields_: ClassVar = [
        ("segments", _Pointer),
        ("count", _Integer),
        ("threads", _Integer),
        ("packed", _Pointer),
        ("low", _Pointer),
    ]


class Attention(ctypes.Structure):
    """One layer's attention of sequences that each add one token."""

    _fields_: ClassVar = [
        ("query", _Pointer),
        ("keys", _Pointer),
        ("values", _Pointer),
        ("output", _Pointer),
        ("rows", _Pointer),
        ("tables", _Pointer),
        ("lengths", _Pointer),
        ("n", _Integer),
        ("width", _Integer),
        ("token_stride", _Integer),
        ("head_stride", _Integer),
        ("heads", _Integer),
        ("kv_heads", _Integer),
        ("head_dim", _Integer),
        ("block_size", _Integer),
        ("window", _Integer),
        ("scaling", ctypes.c_float),
    ]


class Norm(ctypes.Structure):
    """Root mean square normalisation; without `weight` the model has none there."""

    _fields_: ClassVar = [("weight", _Pointer), ("epsilon", ctypes.c_float)]


class DecoderLayer(ctypes.Structure):
    """A decoder layer of the Llama kind, as it was loaded."""

    _fields_: ClassVar = [
        ("qkv", Layer),
        ("o", Layer),
        ("gate_up", Layer),
        ("down", Layer),
        ("input", Norm),
        ("post_attention", Norm),
        ("query", Norm),
        ("key", Norm),
        ("heads", _Integer),
        ("kv_heads", _Integer),
        ("head_dim", _Integer),
        ("window", _Integer),
        ("scaling", ctypes.c_float),
    ]


class Workspace(ctypes.Structure):
    """Memory for what passes between the parts of a decoder layer."""

    _fields_: ClassVar = [
        ("normed", _Pointer),
        ("query", _Pointer),
        ("key", _Pointer),
        ("value", _Pointer),
        ("attended", _Pointer),
        ("middle", _Pointer),
        ("gate", _Pointer),
        ("up", _Pointer),
        ("scores", _Pointer),
        ("stride", _Integer),
    ]


class DecodeStep(ctypes.Structure):
    """What the decoder layers of one step have in common."""

    _fields_: ClassVar = [
        ("linear", _Pointer),
        ("groups", _Pointer),
        ("num_groups", _Integer),
        ("cos", _Pointer),
        ("sin", _Pointer),
        ("slots", _Pointer),
        ("work", Workspace),
    ]


class Kernels:
    """The functions of one compiled library.

    Attributes:
        lanes: floats that one vector of the library holds.
        rows_per_pass: most rows for which the linear kernel reads a weight once.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.linear = library.lorafleet_linear
        """(Layer, Step, x, rows, y0, y1, y2): x [rows, in] and each y [rows, out] are addresses."""
        self.linear.argtypes = [_Pointer, _Pointer, _Pointer, _Integer, _Pointer, _Pointer, _Pointer]
        self.linear.restype = None
        self.decode_attention = library.lorafleet_decode_attention
        """(Attention, scores, stride, threads): `scores` holds `stride` floats for each thread."""
        self.decode_attention.argtypes = [_Pointer, _Pointer, _Integer, _Integer]
        self.decode_attention.restype = None
        self.decoder_layer = library.lorafleet_decoder_layer
        """(DecoderLayer, DecodeStep, x, rows, keys, values, y): x and y [rows, hidden] are addresses."""
        self.decoder_layer.argtypes = [
            _Pointer,
            _Pointer,
            _Pointer,
            _Integer,
            _Pointer,
            _Pointer,
            _Pointer,
        ]
        self.decoder_layer.restype = None
        library.lorafleet_lanes.restype = _Integer
        self.lanes = int(library.lorafleet_lanes())
        library.lorafleet_rows_per_pass.restype = _Integer
        self.rows_per_pass = int(library.lorafleet_rows_per_pass())


def load_kernels() -> Kernels | None:
    """Return the kernels, compiled now if need be; None, with the reason in the log, where that fails."""
    try:
        return Kernels(build_library())
    except (BuildError, OSError, AttributeError) as error:
        logger.warning("the kernels are not compiled and their torch forms run instead: %s", error)
        return None
