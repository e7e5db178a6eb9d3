"""Steps that fail, devices that are lost, and deadlines: who is ended, and that the others never notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from services.inference.driver import Driver
from services.inference.engine.engine import Engine
from services.inference.engine.events import FinishReason, TokenEvent
from services.inference.engine.runner import DeviceLost
from services.inference.engine.throughput import Throughput
from tests.support.engines import FolderFetcher, digest_of, make_engine, request, run_all, tokens_of
from tests.support.models import make_peft_adapter, make_tiny_llama

PROMPT = [40, 50, 60, 70]
POISON = 99


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def make(base: Path, adapter: Path, tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def build(**settings: Any) -> Engine:
        engines.append(make_engine(base, tmp_path / "cache", FolderFetcher({"a": adapter}), **settings))
        return engines[-1]

    yield build
    for engine in engines:
        engine.adapters.close()


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.kv_blocks_free == stats.kv_blocks_total
    assert all((entry.leases, entry.pins) == (0, 0) for entry in engine.adapters.residency())


def fail_on_poison(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make every batch fail that holds the poisoned token; return the sizes of the batches tried."""
    run = engine._runner.run
    sizes: list[int] = []

    def checked(batch: Any) -> Any:
        sizes.append(len(batch.chunks))
        if POISON in batch.input_ids:
            raise RuntimeError("a kernel failed")
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", checked)
    return sizes


def test_107_only_the_sequence_that_fails_alone_is_ended(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {f"r{number}": [30 + number] * (3 + number) for number in range(7)}
    quiet = make()
    for name, prompt in prompts.items():
        quiet.add(request(name, prompt, "a", ignore_eos=True))
    expected = {name: tokens_of(events) for name, events in run_all(quiet).items()}
    engine = make()
    sizes = fail_on_poison(engine, monkeypatch)
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, "a", ignore_eos=True))
    engine.add(request("poisoned", [20, POISON, 20], "a", ignore_eos=True))
    events = run_all(engine)
    (failed,) = events.pop("poisoned")
    assert isinstance(failed.error, Internal)
    assert failed.error.reason == "engine_step_failed"
    assert {name: tokens_of(each) for name, each in events.items()} == expected
    assert sizes[:2] == [8, 4]
    assert engine.faults_in_a_row == 0
    assert_nothing_is_held(engine)


def test_107_a_step_too_large_for_the_memory_is_run_in_parts(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    run = engine._runner.run

    def limited(batch: Any) -> Any:
        if len(batch.chunks) > 2:
            raise MemoryError
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", limited)
    for number in range(5):
        engine.add(request(f"r{number}", [30 + number] * 5, max_tokens=6, ignore_eos=True))
    events = run_all(engine)
    assert {name: len(tokens_of(each)) for name, each in events.items()} == {f"r{n}": 6 for n in range(5)}
    assert_nothing_is_held(engine)


def test_107_nothing_of_a_failed_step_is_found_in_the_prefix_cache(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    with monkeypatch.context() as patch:
        fail_on_poison(engine, patch)
        engine.add(request("bad", [POISON] * 9))
        run_all(engine)
    engine.add(request("good", [POISON] * 9, max_tokens=2, ignore_eos=True))
    assert run_all(engine)["good"][-1].cached_tokens == 0


def test_107_a_lost_device_ends_everything_and_is_never_healthy_again(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()

    def fail(*_: object) -> None:
        raise RuntimeError("an illegal access was encountered")

    def lost() -> None:
        raise DeviceLost("cuda:0 does not answer")

    events: list[TokenEvent] = []
    driver = Driver(engine, max_queued_requests=8)
    driver.start()
    monkeypatch.setattr(engine._runner, "recover", lost)
    monkeypatch.setattr(engine._runner, "run", fail)
    driver.submit(request("r", PROMPT, n=3), events.append)
    deadline = time.monotonic() + 20
    while driver.healthy:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    while len(events) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert all(isinstance(event.error, Unavailable) for event in events)
    assert {event.error.reason for event in events if event.error} == {"device_lost"}
    with pytest.raises(Unavailable):
        driver.submit(request("next", PROMPT), events.append)
    driver.stop()
    assert_nothing_is_held(engine)


def test_110_a_deadline_that_has_passed_costs_no_step(make: Callable[..., Engine]) -> None:
    engine = make()
    driver = Driver(engine, max_queued_requests=8)
    late = replace(request("r", PROMPT), deadline_seconds=time.monotonic())
    with pytest.raises(DeadlineExceeded):
        driver.submit(late, lambda event: None)
    engine.add(late)
    (event,) = engine.step()
    assert isinstance(event.error, DeadlineExceeded)
    assert event.finish_reason is FinishReason.ERROR
    assert engine.stats().steps == 0
    assert_nothing_is_held(engine)


def test_a_deadline_that_cannot_be_met_is_told_at_once(make: Callable[..., Engine]) -> None:
    engine = make(max_batch_tokens=64)
    prompt = [20 + number % 50 for number in range(60)]
    # Steps of 64 tokens are known to take a second.
    engine._throughput.stepped(64, 1.0)
    now = time.monotonic()
    engine.add(replace(request("cannot", prompt, max_tokens=1), deadline_seconds=now + 0.8))
    engine.add(replace(request("may", prompt, max_tokens=1), deadline_seconds=now + 60))
    events = engine.step()
    refused = {event.request_id: event.error for event in events if event.error is not None}
    assert isinstance(refused.get("cannot"), DeadlineExceeded)
    assert refused["cannot"].reason == "deadline_unreachable"
    assert set(refused) == {"cannot"}
    run_all(engine)
    # Its prompt is known by now, so little of it is left to compute.
    engine._throughput.stepped(64, 1.0)
    engine.add(replace(request("hit", prompt, max_tokens=1), deadline_seconds=time.monotonic() + 0.8))
    assert run_all(engine)["hit"][-1].error is None


def test_the_least_time_is_judged_by_steps_as_large() -> None:
    throughput = Throughput()
    assert throughput.least_seconds(1000, 512) == 0.0
    throughput.stepped(4, 1.0)
    assert throughput.least_seconds(1000, 512) == 0.0
    throughput.stepped(512, 1.0)
    assert throughput.least_seconds(1000, 512) == pytest.approx(1000 / 512)
    throughput.stepped(512, 2.0)
    assert throughput.least_seconds(1000, 512) == pytest.approx(1000 / 512, rel=0.02)
    assert throughput.least_seconds(4, 512) == pytest.approx(4 / 512, rel=0.02)


def test_the_time_between_ends_leaves_idle_time_out() -> None:
    throughput = Throughput()
    assert throughput.seconds_per_request(5.0) is None
    throughput.began(10.0)
    for second in (11.0, 12.0, 13.0):
        throughput.finished(second)
    assert throughput.seconds_per_request(13.0) == pytest.approx(1.0, rel=0.1)
    throughput.began(1000.0)
    assert throughput.seconds_per_request(1000.0) == pytest.approx(1.0, rel=0.1)
    assert throughput.seconds_per_request(1010.0) > 3  # type: ignore[operator]


def test_a_full_queue_says_when_to_come_back(make: Callable[..., Engine]) -> None:
    engine = make()
    driver = Driver(engine, max_queued_requests=4, tenant_queue_share=0.5)
    sink: list[TokenEvent] = []
    for number in range(2):
        driver.submit(replace(request(f"flood{number}", PROMPT), tenant="flood"), sink.append)
    with pytest.raises(ResourceExhausted) as caught:
        driver.submit(replace(request("flood", PROMPT), tenant="flood"), sink.append)
    assert (caught.value.reason, caught.value.value, caught.value.limit) == ("queue_full", "2", "2")
    assert caught.value.retry_after_seconds is not None
    driver.submit(replace(request("quiet", PROMPT, max_tokens=2), tenant="quiet"), sink.append)
    driver.start()
    deadline = time.monotonic() + 20
    while sum(event.finish_reason is not None for event in sink) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for number in range(2):
        driver.submit(replace(request(f"more{number}", PROMPT), tenant="flood"), sink.append)
    with pytest.raises(ResourceExhausted) as caught:
        driver.submit(replace(request("more", PROMPT), tenant="flood"), sink.append)
    measured = driver.stats().seconds_per_request
    assert measured is not None
    # These steps take milliseconds, so the hint is far below the guess of one second.
    assert caught.value.retry_after_seconds is not None
    assert caught.value.retry_after_seconds < 0.9
    driver.stop()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_86_an_abort_frees_everything_before_the_next_step(make: Callable[..., Engine], steps: int) -> None:
    engine = make(max_batch_tokens=32)
    prompt = [20 + number % 50 for number in range(50)]
    engine.add(request("gone", prompt, "a", n=3, max_tokens=30, ignore_eos=True))
    engine.add(request("stays", PROMPT, max_tokens=6, ignore_eos=True))
    deadline = time.monotonic() + 20
    while not any(entry.state.value != "fetching" for entry in engine.adapters.residency()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for _ in range(steps):
        engine.step()
    assert engine.abort("gone")
    entry = next(entry for entry in engine.adapters.residency() if entry.digest == digest_of("a"))
    assert (entry.leases, entry.pins) == (0, 0)
    assert engine._blocks.num_live == len(engine._live["stays"][0].blocks)
    assert all(event.request_id == "stays" for event in engine.step())
    run_all(engine)
    assert_nothing_is_held(engine)
