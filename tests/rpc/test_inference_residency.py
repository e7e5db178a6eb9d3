"""Adapters in the tiers, and generation while the registry is away, slow or wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lorafleet.inference.v1 import inference_service_pb2 as calls
from services.common import telemetry as common_telemetry
from services.common.errors import Code, LorafleetError
from services.inference import telemetry
from tests.support.inference import (
    Fleet,
    health_of,
    request,
    running_fleet,
    running_inference,
    running_registry,
    settings_for,
    until_health,
)
from tests.support.models import make_peft_adapter, make_tiny_llama
from tests.support.registry import Place


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", seed=1)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_peft_adapter(base, folder / name, r=4, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture
async def fleet(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> AsyncIterator[Fleet]:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish(adapters)
        yield fleet


async def prefetch(fleet: Fleet, ref: str) -> calls.ResidentAdapter:
    result: calls.ResidentAdapter = await fleet.client.call(
        fleet.client.stub.Prefetch, calls.PrefetchRequest(adapter=ref)
    )
    return result


async def evict(fleet: Fleet, ref: str) -> None:
    await fleet.client.call(fleet.client.stub.Evict, calls.EvictRequest(adapter=ref))


async def test_prefetch_use_and_evict_move_an_adapter_through_the_tiers(fleet: Fleet) -> None:
    resident = await prefetch(fleet, "one")
    assert (resident.version_ref, resident.tier, resident.max_rank) == ("one:1", calls.TIER_HOST, 4)
    assert resident.host_bytes > 0
    assert (resident.leases, resident.device_bytes) == (0, 0)
    status = await fleet.client.status()
    assert status.adapters_host.used_bytes == resident.host_bytes
    assert status.adapters_disk.used_bytes == resident.disk_bytes > resident.host_bytes
    await fleet.client.generate(request(adapter="one"))
    used = (await fleet.client.residents())["one:1"]
    assert used.tier == calls.TIER_DEVICE
    assert used.device_bytes == resident.host_bytes
    assert used.last_use_time.ToNanoseconds() > resident.last_use_time.ToNanoseconds()
    await evict(fleet, "one")
    assert await fleet.client.residents() == {}
    status = await fleet.client.status()
    tiers = (status.adapters_device, status.adapters_host, status.adapters_disk)
    assert [tier.used_bytes for tier in tiers] == [0, 0, 0]
    await evict(fleet, "one")
    assert (await fleet.client.generate(request(adapter="one"))).started.version_ref == "one:1"


async def test_adapter_in_use_is_not_evicted(fleet: Fleet) -> None:
    long = request("Once", "one", max_tokens=300, ignore_eos=True)
    undisturbed = await fleet.client.generate(long)
    running = asyncio.create_task(fleet.client.generate(long))
    await fleet.client.until(lambda status: status.running == 1)
    with pytest.raises(LorafleetError) as caught:
        await evict(fleet, "one")
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, "adapter_in_use")
    assert (await fleet.client.residents())["one:1"].leases == 1
    assert (await running).tokens == undisturbed.tokens
    assert (await fleet.client.residents())["one:1"].leases == 0


async def test_status_counts_and_can_be_watched(fleet: Fleet) -> None:
    await fleet.client.generate(request("Once", max_tokens=5, ignore_eos=True))
    seen = []

    async def watch(message: calls.WatchStatusRequest, *, timeout: float) -> None:
        async for status in fleet.client.stub.WatchStatus(message, timeout=timeout):
            seen.append(status)
            if len(seen) == 3:
                return

    await fleet.client.call(watch, calls.WatchStatusRequest(interval_seconds=0.1))
    for status in seen:
        assert (status.base_model, status.device) == ("tiny", "cpu")
        assert (status.prompt_tokens, status.generated_tokens, status.preemptions) == (4, 5, 0)
        assert status.max_model_len == 512
        assert status.free_kv_blocks == status.total_kv_blocks > 0
        assert status.kv.used_bytes == 0
        assert 0 < status.kv.budget_bytes <= (8 << 20) + status.adapters_device.budget_bytes
        assert status.start_time.ToNanoseconds() > 0


async def test_registry_away_loaded_adapters_serve_and_cold_ones_are_unavailable(fleet: Fleet) -> None:
    warm = {ref: await fleet.client.generate(request(adapter=ref)) for ref in ("one", "one:1")}
    await fleet.stop_registry()
    for ref, before in warm.items():
        after = await fleet.client.generate(request(adapter=ref))
        assert after.tokens == before.tokens
        assert after.started.version_digest == before.started.version_digest
    assert (await fleet.client.generate(request())).started.version_ref == ""
    for ref in ("two", "two:1", "one:2", "one@prod"):
        with pytest.raises(LorafleetError) as caught:
            await fleet.client.generate(request(adapter=ref))
        assert (caught.value.code, caught.value.reason) == (Code.UNAVAILABLE, "adapter_unavailable")
        assert caught.value.retry_after_seconds


async def test_restarted_process_serves_from_its_disk_and_lists_it(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        await fleet.publish(adapters)
        before = await fleet.client.generate(request(adapter="one"))
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        (resident,) = (await fleet.client.residents()).values()
        assert (resident.tier, resident.version_ref) == (calls.TIER_DISK, "one:1")
        assert resident.digest == before.started.version_digest
        assert (await fleet.client.generate(request(adapter="one"))).tokens == before.tokens


async def test_load_that_fails_ends_only_its_own_requests(
    base: Path, adapters: dict[str, Path], tmp_path: Path, redis_url: str
) -> None:
    async with running_fleet(base, tmp_path, redis_url) as fleet:
        versions = await fleet.publish(adapters)
        (digest,) = [
            file.digest for file in versions["two"].files if file.name == "adapter_model.safetensors"
        ]
        (blob,) = [
            path for path in (tmp_path / "store").rglob("*") if digest.removeprefix("sha256:") in path.name
        ]
        blob.chmod(0o600)
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
        good, bad = await asyncio.gather(
            fleet.client.generate(request(adapter="one")),
            fleet.client.generate(request(adapter="two")),
            return_exceptions=True,
        )
        assert isinstance(bad, LorafleetError)
        assert (bad.code, bad.reason) == (Code.DATA_LOSS, "corrupt_blob")
        assert not isinstance(good, BaseException)
        failed = (await fleet.client.residents())["two:1"]
        assert (failed.tier, failed.error_reason) == (calls.TIER_FAILED, "corrupt_blob")
        assert failed.HasField("retry_time")
        await fleet.client.idle()


async def test_calls_wait_for_the_registry_at_start(base: Path, tmp_path: Path, redis_url: str) -> None:
    place = Place.in_directory(redis_url, tmp_path / "store")
    async with running_registry(place) as (registry_address, stop_registry):
        await stop_registry()
        settings = settings_for(base, tmp_path / "cache", registry_address)
        async with running_inference(settings) as (host, address):
            await asyncio.sleep(1.0)
            assert await health_of(address) == "NOT_SERVING"
            async with running_registry(place, listen=registry_address):
                await until_health(address, "SERVING")
            # The registry may go away again: what is loaded goes on.
            assert await health_of(address) == "SERVING"
            await host.not_ready()


async def test_span_tells_the_phases(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(common_telemetry, "tracer", lambda: provider.get_tracer("test"))
    await fleet.client.generate(request("Once", "one", max_tokens=6, ignore_eos=True))
    with pytest.raises(LorafleetError):
        await fleet.client.generate(request("Once", "nobody"))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    span, failed = spans["text_completion one"], spans["text_completion nobody"]
    servers = {
        one.context.span_id
        for one in exporter.get_finished_spans()
        if one.name.endswith("InferenceService/Generate")
    }
    assert span.parent is not None
    assert span.parent.span_id in servers
    attributes = dict(span.attributes or {})
    assert attributes[telemetry.RESPONSE_MODEL] == "one:1"
    assert attributes[telemetry.USAGE_INPUT_TOKENS] == 4
    assert attributes[telemetry.USAGE_OUTPUT_TOKENS] == 6
    assert attributes[telemetry.RESPONSE_FINISH_REASONS] == ("length",)
    phases = [telemetry.QUEUE_SECONDS, telemetry.PREFILL_SECONDS, telemetry.DECODE_SECONDS]
    seconds = [attributes[name] for name in phases]
    assert all(isinstance(value, float) and value > 0 for value in seconds)
    # The adapter was fetched while the request was queued.
    assert [event.name for event in span.events] == [telemetry.EVENT_QUEUED, telemetry.EVENT_FIRST_TOKEN]
    assert (failed.attributes or {})[telemetry.ERROR_TYPE] == "adapter_not_found"
