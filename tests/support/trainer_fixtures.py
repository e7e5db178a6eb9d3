"""The base that the trainer of a test trains on, and where it keeps its things."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import make_tiny_llama
from tests.support.trainer import BASE, TrainerPlace

__all__ = ["base", "place"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / BASE)


@pytest.fixture
def place(base: Path, tmp_path: Path, redis_url: str) -> TrainerPlace:
    # A machine that tests in several processes answers late.
    return TrainerPlace(base, tmp_path, redis_url, call_seconds=100)
