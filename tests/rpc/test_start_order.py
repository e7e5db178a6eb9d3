"""A service started before anything it needs: it waits, tells so, and becomes ready by itself."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from lorafleet.registry.v1 import base_model_pb2
from services.common.channels import open_channel
from services.common.probe import is_ready
from services.common.valkey import EmbeddedValkey
from tests.support.registry import Client, Place, Upload, base_message, reason_of
from tests.support.registry_fixtures import s3_server
from tests.support.s3_server import S3Server
from tests.support.tcp_proxy import tcp_proxy

__all__ = ["s3_server"]

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def registry_process(place: Place, folder: Path) -> AsyncIterator[str]:
    """Run a registry; yield its address as soon as it listens."""
    port_file = folder / "port"
    settings = {
        "LORAFLEET_REGISTRY_REDIS_URL": place.redis_url,
        "LORAFLEET_REGISTRY_STORE_URL": place.store_url,
        "LORAFLEET_PORT_FILE": str(port_file),
    }
    if place.access_key and place.secret_key:
        settings["LORAFLEET_REGISTRY_STORE_ACCESS_KEY"] = place.access_key
        settings["LORAFLEET_REGISTRY_STORE_SECRET_KEY"] = place.secret_key
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.registry",
        cwd=ROOT,
        env=os.environ | settings,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(60):
            while not port_file.exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
        yield port_file.read_text().strip()
        assert process.returncode is None, "it must not have been restarted"
    finally:
        process.kill()
        await process.wait()


async def becomes_ready(address: str) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(is_ready, address):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.1)


async def use(channel: grpc.aio.Channel) -> None:
    client = Client(channel, "acme")
    request = base_model_pb2.CreateBaseModelRequest(base_model=base_message())
    await client.call(client.bases.CreateBaseModel, request)
    published = await client.publish(Upload.made(0))
    assert (await client.resolve("billing")).digest == published.digest


async def test_row_137_the_registry_waits_for_index_and_object_store_and_heals(
    s3_server: S3Server, tmp_path: Path
) -> None:
    with EmbeddedValkey.start(tmp_path / "valkey") as first:
        redis_port = first.port
    # The store is there already, behind a door that is shut: so the registry sees none.
    async with tcp_proxy(s3_server.endpoint.removeprefix("http://")) as door:
        await door.shut()
        behind = S3Server(f"http://{door.address}", s3_server.access_key, s3_server.secret_key)
        place = Place.in_s3(f"redis://127.0.0.1:{redis_port}/0", behind, "registry-" + secrets.token_hex(8))
        async with registry_process(place, tmp_path) as address, open_channel(address) as channel:
            await asyncio.sleep(0.5)
            assert not await asyncio.to_thread(is_ready, address)
            assert await reason_of(Client(channel, "acme").resolve("billing")) == "store_unavailable"
            with EmbeddedValkey.start(tmp_path / "valkey", port=redis_port):
                await asyncio.sleep(0.5)
                assert not await asyncio.to_thread(is_ready, address)
                await door.open()
                await becomes_ready(address)
                await use(channel)


async def test_row_137_the_registry_heals_in_the_other_order(tmp_path: Path) -> None:
    blocked = tmp_path / "objects"
    blocked.write_text("a file where the folder should be")
    with EmbeddedValkey.start(tmp_path / "valkey") as index:
        place = Place.in_directory(index.url, blocked)
        async with registry_process(place, tmp_path) as address, open_channel(address) as channel:
            await asyncio.sleep(0.5)
            assert not await asyncio.to_thread(is_ready, address)
            blocked.unlink()
            await becomes_ready(address)
            await use(channel)
