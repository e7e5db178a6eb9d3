"""A gateway on a real port before fake services on real ports, all on one background thread."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from lorafleet.inference.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from lorafleet.registry.v1.adapter_pb2_grpc import add_AdapterServiceServicer_to_server
from lorafleet.registry.v1.base_model_pb2 import BaseModel, CreateBaseModelRequest
from lorafleet.registry.v1.base_model_pb2_grpc import (
    BaseModelServiceStub,
    add_BaseModelServiceServicer_to_server,
)
from lorafleet.registry.v1.file_pb2_grpc import add_FileServiceServicer_to_server
from lorafleet.trainer.v1.trainer_service_pb2_grpc import add_TrainerServiceServicer_to_server
from services.common.config import ServiceSettings
from services.common.server import ServiceHost
from services.common.store import DirectoryStore
from services.gateway import upstream
from services.gateway.app import create_app
from services.gateway.config import GatewaySettings
from services.gateway.keys import KeyRing, Scope
from services.gateway.server import bind, http_config
from services.registry.config import RegistrySettings
from services.registry.service import SERVICES, Registry
from tests.support.fake_adapters import FakeAdapters
from tests.support.fake_base import FakeBases
from tests.support.fake_files import FakeFiles
from tests.support.fake_inference import FakeInference
from tests.support.fake_trainer import FakeTrainer

PEPPER = "a pepper for tests, long enough"
WAIT_SECONDS = 10.0


@dataclass
class GatewayUnderTest:
    """The gateway's address, a key for tenant `default`, and the services behind it."""

    url: str
    key: str
    keys: KeyRing
    files: FakeFiles
    adapters: FakeAdapters
    inference: FakeInference
    trainer: FakeTrainer
    hosts: dict[str, ServiceHost]
    targets: dict[str, str]
    app: FastAPI
    loop: asyncio.AbstractEventLoop

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        """A plain HTTP client that sends a key."""
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=WAIT_SECONDS, **options)

    @property
    def rpc_address(self) -> str:
        """Where gRPC clients are served, with `grpc_listen` among the settings."""
        return str(self.app.state.grpc_address)

    def new_key(self, tenant: str = "default", *scopes: Scope, lifetime_seconds: int | None = None) -> str:
        """Another key."""
        return self.keys.create(tenant, scopes or tuple(Scope), lifetime_seconds=lifetime_seconds)


@contextmanager
def running_gateway(
    folder: Path, *, registry: RegistrySettings | None = None, **changes: Any
) -> Iterator[GatewayUnderTest]:
    """Run everything; `changes` are settings of the gateway. With `registry` a real one stands behind it."""
    started = threading.Event()
    made: list[GatewayUnderTest] = []
    ends: list[Callable[[], object]] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_serve(folder, registry, changes, made, ends, started))
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread below
            failures.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(WAIT_SECONDS)
    try:
        if failures:
            raise failures[0]
        yield made[0]
    finally:
        for end in ends:
            made[0].loop.call_soon_threadsafe(end)
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the gateway did not stop"
    assert not failures


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, listening: threading.Event) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()


async def _serve(
    folder: Path,
    registry: RegistrySettings | None,
    changes: dict[str, Any],
    made: list[GatewayUnderTest],
    ends: list[Callable[[], object]],
    started: threading.Event,
) -> None:
    # The stubs call every method abstract; one that is left out answers UNIMPLEMENTED.
    files, adapters = FakeFiles(), FakeAdapters()  # type: ignore[abstract]
    inference = FakeInference(adapters)  # type: ignore[abstract]
    trainer = FakeTrainer(lambda tenant, file_id: (tenant, file_id) in files.stored)  # type: ignore[abstract]
    registry_host = ServiceHost(ServiceSettings(), [upstream.ADAPTER_SERVICE, upstream.FILE_SERVICE])
    trainer_host = ServiceHost(ServiceSettings(), [upstream.TRAINER_SERVICE])
    inference_host = ServiceHost(ServiceSettings(), [upstream.INFERENCE_SERVICE])
    add_BaseModelServiceServicer_to_server(FakeBases(), registry_host.server)  # type: ignore[abstract]
    add_FileServiceServicer_to_server(files, registry_host.server)
    add_AdapterServiceServicer_to_server(adapters, registry_host.server)
    add_TrainerServiceServicer_to_server(trainer, trainer_host.server)
    add_InferenceServiceServicer_to_server(inference, inference_host.server)
    hosts = {"registry": registry_host, "trainer": trainer_host, "inference": inference_host}
    targets = {name: str(await host.start()) for name, host in hosts.items()}
    for host in hosts.values():
        await host.ready()
    if registry is not None:
        hosts["registry"] = ServiceHost(registry, SERVICES)
        real = Registry(registry)
        await real.register(hosts["registry"])
        await real.probe()
        targets["registry"] = str(await hosts["registry"].start())
        await registry_host.stop(grace_seconds=0)
    store = DirectoryStore(folder / "store")
    settings = GatewaySettings(
        **{
            "listen": "127.0.0.1:0",
            "store_url": f"file://{folder}/store",
            "key_pepper": SecretStr(PEPPER),
            # Tests that take a service away want to hear of it at once.
            "replica_wait_seconds": 0,
            **{f"{name}_target": target for name, target in targets.items()},
            **changes,
        }
    )
    keys = KeyRing(store, PEPPER, cache_seconds=0)
    listener = bind(settings)
    app = create_app(settings, store)
    server = _Server(http_config(app, settings), started)
    ends.append(lambda: setattr(server, "should_exit", True))
    made.append(
        GatewayUnderTest(
            url=f"http://127.0.0.1:{listener.getsockname()[1]}",
            key=keys.create("default"),
            keys=keys,
            files=files,
            adapters=adapters,
            inference=inference,
            trainer=trainer,
            hosts=hosts,
            targets=targets,
            app=app,
            loop=asyncio.get_running_loop(),
        )
    )
    await server.serve(sockets=[listener])
    for host in hosts.values():
        await host.stop(grace_seconds=0)


def create_base(gateway: GatewayUnderTest, base: BaseModel) -> None:
    """Record a base in the real registry behind a gateway, as inference does at its start."""
    with grpc.insecure_channel(gateway.targets["registry"]) as channel:
        create: Any = BaseModelServiceStub(channel).CreateBaseModel
        create(CreateBaseModelRequest(base_model=base), metadata=[("lorafleet-tenant", "default")])


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def sse_objects(text: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the objects of a stream of server-sent events, and whether it ended with `[DONE]`."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "", "the last event is cut"
    payloads = []
    for block in blocks:
        assert block.startswith("data: "), block
        assert "\n" not in block, block
        payloads.append(block.removeprefix("data: "))
    is_done = payloads[-1:] == ["[DONE]"]
    return [json.loads(payload) for payload in (payloads[:-1] if is_done else payloads)], is_done
