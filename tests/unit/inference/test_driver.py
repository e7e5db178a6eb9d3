"""The device thread: requests from many threads in, events out, and faults that do not end it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.errors import Internal, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from services.inference.driver import Driver
from services.inference.engine.engine import Engine
from services.inference.engine.events import FinishReason, TokenEvent
from tests.support.engines import FolderFetcher, digest_of, make_engine, request, run_all, tokens_of
from tests.support.models import make_peft_adapter, make_tiny_llama

PROMPT = [40, 50, 60, 70]
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def fetcher(adapter: Path) -> FolderFetcher:
    return FolderFetcher({"a": adapter})


@pytest.fixture
def engine(base: Path, fetcher: FolderFetcher, tmp_path: Path) -> Engine:
    return make_engine(base, tmp_path / "cache", fetcher)


@pytest.fixture
def driver(engine: Engine) -> Iterator[Driver]:
    driver = Driver(engine, max_queued_requests=8)
    driver.start()
    yield driver
    driver.stop()


class Client:
    """Collects one request's events."""

    def __init__(self) -> None:
        self.events: queue.Queue[TokenEvent] = queue.Queue()

    def all(self, sequences: int = 1) -> list[TokenEvent]:
        """Wait for the last event of each of `sequences`."""
        events: list[TokenEvent] = []
        while sum(event.finish_reason is not None for event in events) < sequences:
            events.append(self.events.get(timeout=30))
        return events


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def test_requests_of_many_threads_get_what_the_engine_gives_alone(
    driver: Driver, base: Path, tmp_path: Path, fetcher: FolderFetcher
) -> None:
    alone = make_engine(base, tmp_path / "other", fetcher)
    prompts = [[30 + number] * (number + 1) for number in range(8)]
    for number, prompt in enumerate(prompts):
        alone.add(request(str(number), prompt, "a" if number % 2 else None))
    expected = {name: tokens_of(events) for name, events in run_all(alone).items()}
    alone.adapters.close()
    clients = [Client() for _ in prompts]

    def submit(number: int) -> None:
        name = "a" if number % 2 else None
        driver.submit(request(str(number), prompts[number], name), clients[number].events.put)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for number, client in enumerate(clients):
        assert tokens_of(client.all()) == expected[str(number)]
    for thread in threads:
        thread.join()
    assert driver.healthy
    wait_for(lambda: driver.stats().running == 0)


def test_a_bad_request_is_refused_in_the_callers_thread(driver: Driver) -> None:
    with pytest.raises(InvalidArgument):
        driver.submit(request("r", [], max_tokens=1), Client().events.put)


def test_an_unknown_adapter_ends_every_sequence_with_its_error(driver: Driver) -> None:
    for name in ("first", "remembered"):
        client = Client()
        driver.submit(request(name, PROMPT, "nobody", n=3), client.events.put)
        events = client.all(sequences=3)
        assert {event.index for event in events} == {0, 1, 2}
        assert all(isinstance(event.error, NotFound) for event in events)


def test_abort_frees_and_silences(driver: Driver, engine: Engine) -> None:
    client = Client()
    driver.submit(request("r", PROMPT, "a", **LONG), client.events.put)
    client.events.get(timeout=30)
    driver.abort("r")
    driver.abort("r")
    wait_for(lambda: not engine.has_work)
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
    assert all(entry.leases == 0 for entry in engine.adapters.residency())
    seen = client.events.qsize()
    time.sleep(0.05)
    assert client.events.qsize() == seen
    assert all(event.finish_reason is None for event in list(client.events.queue))


def test_more_than_the_queue_holds_is_refused_with_a_time(driver: Driver) -> None:
    clients = [Client() for _ in range(8)]
    for number, client in enumerate(clients):
        driver.submit(request(str(number), PROMPT, **LONG), client.events.put)
    with pytest.raises(ResourceExhausted) as caught:
        driver.submit(request("more", PROMPT), Client().events.put)
    assert caught.value.reason == "queue_full"
    assert caught.value.retry_after_seconds is not None
    driver.abort("0")
    driver.submit(request("more", PROMPT, max_tokens=1), clients[0].events.put)
    for number in range(1, 8):
        driver.abort(str(number))
    assert any(event.request_id == "more" for event in clients[0].all())


def test_a_failed_step_ends_what_ran_and_nothing_else(
    driver: Driver, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine._runner.run
    failures = iter([True])

    def sometimes(batch: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("device lost")
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", sometimes)
    client = Client()
    driver.submit(request("lost", PROMPT, max_tokens=4), client.events.put)
    (event,) = client.all()
    assert isinstance(event.error, Internal)
    assert event.error.reason == "engine_step_failed"
    assert "device lost" not in event.error.message
    client = Client()
    driver.submit(request("next", PROMPT, max_tokens=4, ignore_eos=True), client.events.put)
    assert len(tokens_of(client.all())) == 4
    assert driver.healthy
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_faults_in_a_row_make_it_unhealthy_until_a_step_succeeds(
    driver: Driver, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(batch: Any) -> Any:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", always)
        for number in range(3):
            client = Client()
            driver.submit(request(str(number), PROMPT), client.events.put)
            client.all()
        wait_for(lambda: not driver.healthy)
    client = Client()
    driver.submit(request("again", PROMPT, max_tokens=2), client.events.put)
    client.all()
    wait_for(lambda: driver.healthy)


def test_a_sink_that_fails_ends_only_its_request(driver: Driver, engine: Engine) -> None:
    def broken(event: TokenEvent) -> None:
        raise RuntimeError("the loop is closed")

    client = Client()
    driver.submit(request("broken", PROMPT, **LONG), broken)
    driver.submit(request("whole", PROMPT, max_tokens=8, ignore_eos=True), client.events.put)
    assert len(tokens_of(client.all())) == 8
    wait_for(lambda: not engine.has_work)


def test_stop_ends_running_and_waiting_requests(engine: Engine, fetcher: FolderFetcher) -> None:
    fetcher.delay_seconds[digest_of("a")] = 0.5
    driver = Driver(engine, max_queued_requests=8)
    driver.start()
    running, waiting = Client(), Client()
    driver.submit(request("running", PROMPT, **LONG), running.events.put)
    driver.submit(request("waiting", PROMPT, "a", **LONG), waiting.events.put)
    running.events.get(timeout=30)
    driver.stop()
    for client in (running, waiting):
        last = client.all()[-1]
        assert last.finish_reason is FinishReason.ERROR
        assert isinstance(last.error, Unavailable)
    with pytest.raises(Unavailable):
        driver.submit(request("late", PROMPT), Client().events.put)
    assert not driver.healthy
    assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total


def test_an_idle_driver_does_not_spin(driver: Driver) -> None:
    client = Client()
    driver.submit(request("r", PROMPT, max_tokens=2), client.events.put)
    client.all()
    wait_for(lambda: driver.stats().running == 0)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.2
