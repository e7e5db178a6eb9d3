"""Resolving and fetching against a registry that misbehaves on purpose, on a real port."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lorafleet.registry.v1 import adapter_pb2, adapter_pb2_grpc
from services.common.adapter_format import version_digest
from services.common.call_context import call_scope, current_tenant
from services.common.channels import open_channel
from services.common.config import ServiceSettings
from services.common.errors import Code, LorafleetError, NotFound, Unavailable
from services.common.server import ServiceHost
from services.inference.fetcher import RegistryFetcher
from services.inference.resolver import AdapterResolver, ResolverLimits
from services.inference.sources import AdapterSource, AdapterSources

BASE_DIGEST = "sha256:" + "b" * 64
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 40}
WEIGHTS = "adapter_model.safetensors"
CHUNK_BYTES = 1000


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def version(**changes: Any) -> adapter_pb2.AdapterVersion:
    config, weights = (sha256(data) for data in FILES.values())
    fields: dict[str, Any] = {
        "adapter": "one",
        "version": 3,
        "digest": version_digest(config_digest=config, weights_digest=weights, base_digest=BASE_DIGEST),
        "state": adapter_pb2.VERSION_STATE_READY,
        "base_fingerprint_digest": BASE_DIGEST,
        "files": [
            adapter_pb2.AdapterFile(name=name, digest=sha256(data), size_bytes=len(data))
            for name, data in FILES.items()
        ],
        "format": adapter_pb2.AdapterFormat(kind=adapter_pb2.DELTA_KIND_LORA, max_rank=8),
    }
    return adapter_pb2.AdapterVersion(**(fields | changes))


@dataclass
class OddRegistry(adapter_pb2_grpc.AdapterServiceServicer):
    """Answers `version()`; a test sets what goes wrong."""

    answer: Callable[[str], adapter_pb2.AdapterVersion] = field(default=lambda _: version())
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    cuts: int = 0
    cut_after_chunks: int = 3
    shift: int = 0
    pause_seconds: float = 0.0
    refusal: LorafleetError | None = None
    resolved: list[tuple[str, str]] = field(default_factory=list)
    downloads: list[tuple[str, str, str, int]] = field(default_factory=list)

    async def ResolveVersion(
        self, request: adapter_pb2.ResolveVersionRequest, context: Any
    ) -> adapter_pb2.AdapterVersion:
        self.resolved.append((current_tenant(), request.ref))
        return self.answer(request.ref)

    async def DownloadVersion(
        self, request: adapter_pb2.DownloadVersionRequest, context: Any
    ) -> AsyncIterator[adapter_pb2.DownloadVersionResponse]:
        self.downloads.append((current_tenant(), request.ref, request.file, request.offset))
        if self.refusal is not None:
            raise self.refusal
        data = self.files[request.file]
        for sent, offset in enumerate(range(request.offset, len(data), CHUNK_BYTES)):
            if request.file == WEIGHTS and self.cuts and sent == self.cut_after_chunks:
                self.cuts -= 1
                raise Unavailable("store_unavailable", "The line was cut.")
            yield adapter_pb2.DownloadVersionResponse(
                offset=offset + self.shift, data=data[offset : offset + CHUNK_BYTES]
            )
            await asyncio.sleep(self.pause_seconds)


def odd_registry(**changes: Any) -> OddRegistry:
    return OddRegistry(**changes)  # type: ignore[abstract] # The other calls are not made.


@asynccontextmanager
async def serving(registry: OddRegistry) -> AsyncIterator[str]:
    host = ServiceHost(ServiceSettings(), ["lorafleet.registry.v1.AdapterService"])
    adapter_pb2_grpc.add_AdapterServiceServicer_to_server(registry, host.server)
    address = await host.start()
    try:
        yield str(address)
    finally:
        await host.stop(grace_seconds=0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def resolving(
    registry: OddRegistry, clock: Clock | None = None
) -> AsyncIterator[tuple[AdapterResolver, AdapterSources, str]]:
    async with serving(registry) as address, open_channel(address) as channel:
        sources = AdapterSources()
        limits = ResolverLimits(timeout_seconds=1.0, fresh_seconds=5.0, stale_seconds=600.0)
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        resolver = AdapterResolver(stub, sources, BASE_DIGEST, limits, clock=clock or Clock())
        with call_scope(tenant="acme"):
            yield resolver, sources, address


async def fetched(registry: OddRegistry, into: Path, *, timeout_seconds: float = 10.0) -> dict[str, bytes]:
    """Resolve, fetch on a thread as loaders do, and return the files."""
    async with resolving(registry) as (resolver, sources, address):
        source = await resolver.resolve("one@prod", field="model.adapter")
        fetcher = RegistryFetcher(address, sources, timeout_seconds=timeout_seconds)
        try:
            await asyncio.to_thread(fetcher.fetch, source.digest, into)
        finally:
            fetcher.close()
    return await asyncio.to_thread(lambda: {path.name: path.read_bytes() for path in into.iterdir()})


async def test_fetch_asks_by_digest_for_the_tenant(tmp_path: Path) -> None:
    registry = odd_registry()
    assert await fetched(registry, tmp_path) == FILES
    ref = f"one@{version().digest}"
    assert registry.resolved == [("acme", "one@prod")]
    assert registry.downloads == [("acme", ref, name, 0) for name in FILES]


async def test_129_cut_download_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    registry = odd_registry(cuts=3)
    assert await fetched(registry, tmp_path) == FILES
    offsets = [offset for _, _, name, offset in registry.downloads if name == WEIGHTS]
    assert offsets == [0, 3000, 6000, 9000]


async def test_download_without_progress_is_given_up(tmp_path: Path) -> None:
    registry = odd_registry(cuts=100, cut_after_chunks=0)
    with pytest.raises(LorafleetError) as caught:
        await fetched(registry, tmp_path)
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "adapter_unavailable")
    assert len([name for _, _, name, _ in registry.downloads if name == WEIGHTS]) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"files": FILES | {WEIGHTS: FILES[WEIGHTS][:-1] + b"x"}},
        {"files": FILES | {WEIGHTS: FILES[WEIGHTS][:-1]}},
        {"files": FILES | {WEIGHTS: FILES[WEIGHTS] + b"x"}},
        {"shift": 1},
    ],
    ids=["altered", "short", "long", "elsewhere"],
)
async def test_bytes_that_do_not_match_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LorafleetError) as caught:
        await fetched(odd_registry(**change), tmp_path)
    assert (caught.value.code, caught.value.reason) == (Code.DATA_LOSS, "corrupt_blob")


async def test_slow_download_ends_in_time(tmp_path: Path) -> None:
    with pytest.raises(LorafleetError) as caught:
        await fetched(odd_registry(pause_seconds=0.2), tmp_path, timeout_seconds=0.5)
    assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "adapter_unavailable")


async def test_what_the_registry_says_of_a_fetch_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(LorafleetError) as caught:
        await fetched(odd_registry(refusal=NotFound("adapter_deleted", "It is gone.")), tmp_path)
    assert caught.value.reason == "adapter_deleted"


async def test_unknown_digest_asks_to_resolve_again() -> None:
    fetcher = RegistryFetcher("127.0.0.1:1", AdapterSources(), timeout_seconds=1.0)
    with pytest.raises(Unavailable) as caught:
        fetcher.fetch(version().digest, Path("unused"))
    fetcher.close()
    assert caught.value.reason == "adapter_unavailable"


def test_sources_forget_the_oldest() -> None:
    sources = AdapterSources(limit=2)
    made = [
        AdapterSource("acme", f"sha256:{number}", f"one@sha256:{number}", f"one:{number}", 8, {})
        for number in range(3)
    ]
    for source in (made[0], made[1], made[0], made[2]):
        sources.note(source)
    assert [sources.get(source.digest) for source in made] == [made[0], None, made[2]]


async def test_only_immutable_references_are_remembered() -> None:
    registry, clock = odd_registry(), Clock()
    async with resolving(registry, clock) as (resolver, _, _):
        digest = f"one@{version().digest}"
        for ref in ("one", "one@prod", "one:3", digest) * 2:
            assert (await resolver.resolve(ref, field="model.adapter")).version_ref == "one:3"
        counts = {ref: registry.resolved.count(("acme", ref)) for ref in ("one", "one@prod", "one:3", digest)}
        assert counts == {"one": 2, "one@prod": 2, "one:3": 1, digest: 1}
        clock.now += 6
        await resolver.resolve("one:3", field="model.adapter")
        assert registry.resolved.count(("acme", "one:3")) == 2
        with call_scope(tenant="stranger"):
            await resolver.resolve("one:3", field="model.adapter")
        assert registry.resolved[-1] == ("stranger", "one:3")


async def test_last_answer_stands_while_the_registry_is_away_but_not_for_ever() -> None:
    registry, clock = odd_registry(), Clock()

    def away(_: str) -> adapter_pb2.AdapterVersion:
        raise Unavailable("store_unavailable", "The store is away.")

    def gone(_: str) -> adapter_pb2.AdapterVersion:
        raise NotFound("adapter_deleted", "It is gone.")

    async with resolving(registry, clock) as (resolver, _, _):
        await resolver.resolve("one@prod", field="model.adapter")
        registry.answer = away
        clock.now += 599
        assert (await resolver.resolve("one@prod", field="model.adapter")).version_ref == "one:3"
        clock.now += 2
        with pytest.raises(LorafleetError) as caught:
            await resolver.resolve("one@prod", field="model.adapter")
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "adapter_unavailable")
        # A refusal is not an absence: it ends what was remembered.
        registry.answer = lambda _: version()
        await resolver.resolve("one@prod", field="model.adapter")
        registry.answer = gone
        with pytest.raises(NotFound):
            await resolver.resolve("one@prod", field="model.adapter")
        registry.answer = away
        with pytest.raises(Unavailable):
            await resolver.resolve("one@prod", field="model.adapter")


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        (
            version(base_fingerprint_digest="sha256:" + "c" * 64),
            Code.FAILED_PRECONDITION,
            "base_revision_mismatch",
        ),
        (version(state=adapter_pb2.VERSION_STATE_DELETED), Code.NOT_FOUND, "adapter_deleted"),
        (version(digest="sha256:" + "d" * 64), Code.DATA_LOSS, "corrupt_version"),
        (version(files=version().files[:1]), Code.DATA_LOSS, "corrupt_version"),
        (
            version(format=adapter_pb2.AdapterFormat(kind=adapter_pb2.DELTA_KIND_UNSPECIFIED)),
            Code.FAILED_PRECONDITION,
            "unsupported_adapter_kind",
        ),
    ],
    ids=["base", "deleted", "digest", "files", "kind"],
)
async def test_versions_that_cannot_be_served_are_refused(
    answer: adapter_pb2.AdapterVersion, code: Code, reason: str
) -> None:
    async with resolving(odd_registry(answer=lambda _: answer)) as (resolver, sources, _):
        with pytest.raises(LorafleetError) as caught:
            await resolver.resolve("one", field="model.adapter")
        assert (caught.value.code, caught.value.reason) == (code, reason)
        assert sources.get(answer.digest) is None


async def test_silent_registry_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with open_channel(f"127.0.0.1:{silent.getsockname()[1]}") as channel:
            limits = ResolverLimits(timeout_seconds=0.3, fresh_seconds=5.0, stale_seconds=600.0)
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            resolver = AdapterResolver(stub, AdapterSources(), BASE_DIGEST, limits)
            with call_scope(tenant="acme"), pytest.raises(LorafleetError) as caught:
                await asyncio.wait_for(resolver.resolve("one", field="model.adapter"), timeout=3)
    assert caught.value.reason == "adapter_unavailable"
