"""What every test may use: a real Valkey server, one for the whole run and empty for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

# Under `python -O` only rewritten asserts are run, and pytest rewrites test modules only unless told.
pytest.register_assert_rewrite("tests.support")

from services.common.valkey import EmbeddedValkey  # noqa: E402 - nothing of tests.support comes before

# Read by torch when it is first imported: the tests share two cores with each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A running Valkey server. A test that kills or stops one starts its own."""
    directory: Path = tmp_path_factory.mktemp("valkey")
    with EmbeddedValkey.start(directory) as server:
        yield server


@pytest.fixture
def redis_url(valkey_server: EmbeddedValkey) -> str:
    """The URL of a Valkey server that holds nothing."""
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
    return valkey_server.url
