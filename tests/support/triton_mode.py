"""Where tests of Triton's kernels run: in Triton's interpreter, on CPU tensors (`make test-triton`)."""

from __future__ import annotations

import importlib.util
import os

import pytest

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None

in_the_interpreter = pytest.mark.skipif(
    not IS_INTERPRETING, reason="needs Triton and its interpreter: make test-triton"
)
