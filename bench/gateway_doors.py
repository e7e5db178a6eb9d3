"""A gateway and what stands behind it, each in a process of its own, and its two doors for a load.

`open_doors` starts a Valkey server, an inference service that only keeps a pace, and a gateway with a key
whose limits are checked in Valkey. A load then asks for completions directly by gRPC (`DirectDoor`) or by
HTTP through the gateway (`HttpDoor`); both answer with the times at which tokens came.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc

from bench.service_process import ROOT, service_process
from lorafleet.inference.v1.generation_pb2 import GenerateRequest, ModelRef, SamplingParams
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from services.common.channels import open_channel
from services.common.status import from_rpc_error, is_ours
from services.common.store import DirectoryStore
from services.common.valkey import EmbeddedValkey
from services.gateway.keys import KeyLimits, KeyRing, Scope
from tests.support.paced_inference import BASE

PEPPER = "a pepper for benchmarks only"
PROMPT = "What does a gateway cost?"
START_SECONDS = 60.0
# Checked for each request, and never reached.
LIMITS = KeyLimits(requests_per_minute=10_000_000, tokens_per_minute=1_000_000_000)


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the doors are, and the key for HTTP."""

    inference: str
    gateway: str
    key: str


@dataclass(slots=True)
class Answer:
    """When a request was sent, and when its tokens and its end came; monotonic clock, seconds."""

    due_at: float
    tokens_at: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    status: str = "ok"

    @property
    def first_seconds(self) -> float:
        """Time to first token."""
        return self.tokens_at[0] - self.due_at

    @property
    def whole_seconds(self) -> float:
        """Time to the end."""
        return self.ended_at - self.due_at


class Door(Protocol):
    """A way to ask for completions."""

    name: str

    async def ask(self, due_at: float, tokens: int, *, stream: bool) -> Answer:
        """Ask for a completion of `tokens`; the answer's status is `ok` or the reason of a refusal."""
        ...


@contextmanager
def open_doors(
    *, step_seconds: float, places: int = 256, queue: int = 256, limits: str = "valkey"
) -> Iterator[Addresses]:
    """Run everything until the end.

    Args:
        step_seconds: as `tests.support.paced_inference`, like `places` and `queue`.
        limits: where the key's limits are kept, `valkey` or `process`: a Valkey server that has to wait for a
            processor makes every request wait, and says nothing about the gateway.
    """
    with (
        tempfile.TemporaryDirectory(prefix="lorafleet-gateway-") as scratch,
        EmbeddedValkey.start(Path(scratch) / "valkey") as valkey,
        paced_inference(Path(scratch), step_seconds, places, queue) as inference,
    ):
        store = Path(scratch) / "store"
        keys = KeyRing(DirectoryStore(store), PEPPER, cache_seconds=0)
        _, key = keys.make("default", tuple(Scope), limits=LIMITS)
        settings = {
            "STORE_URL": f"file://{store}",
            "KEY_PEPPER": PEPPER,
            "INFERENCE_TARGET": inference,
        }
        if limits == "valkey":
            settings["REDIS_URL"] = valkey.url
        with service_process("gateway", Path(scratch), settings) as gateway:
            yield Addresses(inference, gateway, key)


@contextmanager
def paced_inference(folder: Path, step_seconds: float, places: int, queue: int) -> Iterator[str]:
    """Run the inference service and yield its address."""
    port_file = folder / "inference.port"
    options = {"port-file": port_file, "step-seconds": step_seconds, "places": places, "queue": queue}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAFLEET_")}
    with (folder / "inference.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.paced_inference", *words],
            cwd=ROOT,
            env=environment,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not port_file.exists():
                assert process.poll() is None, "the inference service ended"
                assert time.monotonic() < deadline, "the inference service does not listen"
                time.sleep(0.02)
            yield port_file.read_text("ascii").strip()
        finally:
            process.terminate()
            process.wait(timeout=START_SECONDS)


class DirectDoor:
    """gRPC to the inference service, by the channel that the gateway itself uses."""

    name = "direct"

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self._stub = InferenceServiceStub(self._channel)

    async def ask(self, due_at: float, tokens: int, *, stream: bool) -> Answer:
        """As `Door.ask`; every answer of gRPC is a stream."""
        answer = Answer(due_at)
        request = GenerateRequest(
            model=ModelRef(base=True), text=PROMPT, sampling=SamplingParams(max_tokens=tokens)
        )
        try:
            async for event in self._stub.Generate(request, metadata=(("lorafleet-tenant", "default"),)):
                if event.WhichOneof("event") == "delta":
                    answer.tokens_at.append(time.monotonic())
        except grpc.aio.AioRpcError as error:
            answer.status = from_rpc_error(error).reason if is_ours(error) else error.code().name
        answer.ended_at = time.monotonic()
        return answer

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class HttpDoor:
    """`POST /v1/completions` over kept connections; no more of HTTP than our own server's answers need.

    A client library would spend as much time on an answer as the gateway, and that would be counted here.
    """

    name = "gateway"

    def __init__(self, address: str, key: str) -> None:
        self._address = address
        self._key = key
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, due_at: float, tokens: int, *, stream: bool) -> Answer:
        """As `Door.ask`."""
        answer = Answer(due_at)
        host, _, port = self._address.rpartition(":")
        # The server closes what was idle for long.
        self._idle = [kept for kept in self._idle if not kept[0].at_eof()]
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(host, int(port))
        reader, writer = connection
        body = {"model": BASE, "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
        writer.write(self._request(body))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        if "transfer-encoding: chunked" in head:
            await _read_events(reader, answer)
        else:
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            content = json.loads(await reader.readexactly(length))
            if status == 200:
                answer.tokens_at.append(time.monotonic())
                assert content["usage"]["completion_tokens"] == tokens, content
            else:
                answer.status = content["error"]["code"]
        answer.ended_at = time.monotonic()
        self._idle.append(connection)
        return answer

    async def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()

    def _request(self, body: Mapping[str, object]) -> bytes:
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self._address}\r\nauthorization: Bearer {self._key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode("ascii") + content


@asynccontextmanager
async def both_doors(addresses: Addresses) -> AsyncIterator[tuple[DirectDoor, HttpDoor]]:
    """Yield the two doors; close them in the end."""
    direct, gateway = DirectDoor(addresses.inference), HttpDoor(addresses.gateway, addresses.key)
    try:
        yield direct, gateway
    finally:
        await direct.close()
        await gateway.close()


async def _read_events(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Read a chunked body of server-sent events, each of which is a chunk."""
    last = b""
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size + 2)
        if b'"text":" token"' in chunk:
            answer.tokens_at.append(time.monotonic())
        last = chunk
    await reader.readline()
    if b"[DONE]" not in last:
        answer.status = json.loads(last.removeprefix(b"data: "))["error"]["code"]


def percentile(values: list[float], share: float) -> float:
    """Return the value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
