"""Where the registry of a test keeps its things, and a client of it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio

from services.common.store import DirectoryStore
from tests.support.registry import (
    Client,
    Place,
    registry_client,
)
from tests.support.s3_server import S3Server, s3_server

__all__ = ["CONFIG", "WEIGHTS", "client", "flush", "local", "place", "s3_server", "stored_keys"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(params=["directory", "s3"])
def place(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Place:
    if request.param == "directory":
        return Place.in_directory(redis_url, tmp_path / "objects")
    server: S3Server = request.getfixturevalue("s3_server")
    return Place.in_s3(redis_url, server, "registry-" + secrets.token_hex(8))


@pytest.fixture
def local(redis_url: str, tmp_path: Path) -> Place:
    return Place.in_directory(redis_url, tmp_path / "objects")


@pytest.fixture
async def client(local: Place) -> AsyncIterator[Client]:
    async with registry_client(local) as running:
        yield running


def stored_keys(tmp_path: Path) -> list[str]:
    return [found.key for found in DirectoryStore(tmp_path / "objects").list("")]


async def flush(place: Place) -> None:
    async with redis.asyncio.Redis.from_url(place.redis_url) as index:
        await index.flushall()
