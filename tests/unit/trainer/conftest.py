"""A tiny base and rows for it, for the tests of the training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.common.fingerprint import ComputeDtype, Quantization, QuantizationType
from services.trainer.training.base import BaseFolder
from tests.support.models import make_tiny_llama

FULL = Quantization.none(ComputeDtype.FLOAT32)
NF4 = Quantization(QuantizationType.NF4, 64, True, ComputeDtype.FLOAT32)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def full_base(base_path: Path) -> BaseFolder:
    """The tiny base in float32."""
    return BaseFolder("tiny-llama", base_path, FULL)


@pytest.fixture(scope="session")
def nf4_base(base_path: Path) -> BaseFolder:
    """The tiny base in NF4."""
    return BaseFolder("tiny-llama", base_path, NF4)
