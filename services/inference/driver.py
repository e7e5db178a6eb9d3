"""The one thread that owns the device: it takes requests in, steps the engine and hands events out."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import (
    DeadlineExceeded,
    Internal,
    LorafleetError,
    ResourceExhausted,
    Unavailable,
)
from services.inference.engine.engine import Engine
from services.inference.engine.events import FinishReason, TokenEvent
from services.inference.engine.request import Request
from services.inference.engine.runner import DeviceLost
from services.inference.engine.stats import EngineStats
from services.inference.queue_share import QueueShare

logger = logging.getLogger(__name__)

EventSink = Callable[[TokenEvent], None]

# Wakes the thread for deadlines while every request waits for its adapter.
_IDLE_SECONDS = 0.1
_MAX_FAULTS_IN_A_ROW = 3
_RETRY_AFTER_SECONDS = 1.0
_MAX_RETRY_AFTER_SECONDS = 60.0


@dataclass(slots=True)
class _Client:
    """Whose request it is, where its events go, and how many of its sequences are still to end."""

    tenant: str
    sink: EventSink
    unfinished: int


class Driver:
    """Runs an engine on a thread of its own.

    `submit` and `abort` may be called from any thread and return at once. Events are given to the request's
    sink on the driver's thread; a sink must not block. The last event of each sequence has a finish reason.
    """

    def __init__(self, engine: Engine, *, max_queued_requests: int, tenant_queue_share: float = 1.0) -> None:
        self._engine = engine
        self._queue = QueueShare(max_queued_requests, tenant_queue_share)
        self._wakeup = threading.Condition()
        self._incoming: deque[Request] = deque()
        self._aborted: deque[str] = deque()
        self._clients: dict[str, _Client] = {}
        self._stopping = False
        self._is_device_lost = False
        self._faults_in_a_row = 0
        self._stats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.adapters.on_change = self._wake

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_seconds: float = 30.0) -> None:
        """End all requests with `Unavailable`, stop the thread and the adapter loaders, and wait for both."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        self._thread.join(timeout_seconds)
        self._engine.adapters.close()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and its steps succeed. It is not healed where the device is lost."""
        is_failing = self._is_device_lost or self._faults_in_a_row >= _MAX_FAULTS_IN_A_ROW
        return self._thread.is_alive() and not is_failing

    def stats(self) -> EngineStats:
        """Return the engine's counters and gauges as of its latest step."""
        return self._stats

    def submit(self, request: Request, sink: EventSink) -> None:
        """Queue a request; its events go to `sink`.

        Raises:
            InvalidArgument: it can never be served.
            DeadlineExceeded: its deadline has passed already.
            ResourceExhausted: `queue_full`, with the time in which a place should be free.
            Unavailable: `engine_stopping` or `device_lost`.
        """
        self._engine.limits.check(request)
        if request.deadline_seconds is not None and time.monotonic() >= request.deadline_seconds:
            raise DeadlineExceeded("deadline_exceeded", "The request's deadline has passed already.")
        with self._wakeup:
            if self._stopping:
                raise Unavailable("engine_stopping", "The engine is shutting down.")
            if self._is_device_lost:
                raise _device_lost_error()
            self._take_place(request.tenant)
            assert request.id not in self._clients, "request ids are made by us and never repeat"
            self._clients[request.id] = _Client(request.tenant, sink, request.sampling.n)
            self._incoming.append(request)
            self._wakeup.notify()

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds; its sink hears nothing more. Harmless if it has ended."""
        with self._wakeup:
            if self._drop_client(request_id) is not None:
                self._aborted.append(request_id)
                self._wakeup.notify()

    def _take_place(self, tenant: str) -> None:
        if self._queue.take(tenant):
            return
        seconds_per_request = self._stats.seconds_per_request or _RETRY_AFTER_SECONDS
        raise ResourceExhausted(
            "queue_full",
            f"{self._queue.held} requests are being served or wait already, "
            f"{self._queue.held_by(tenant)} of them of this tenant.",
            value=self._queue.held_by(tenant),
            limit=self._queue.limit_of(tenant),
            # Places become free in turn, for one tenant after another.
            retry_after_seconds=min(seconds_per_request * self._queue.num_tenants, _MAX_RETRY_AFTER_SECONDS),
        )

    def _drop_client(self, request_id: str) -> _Client | None:
        client = self._clients.pop(request_id, None)
        if client is not None:
            self._queue.give_back(client.tenant)
        return client

    def _run(self) -> None:
        while True:
            with self._wakeup:
                self._wakeup.wait_for(
                    self._has_news, timeout=_IDLE_SECONDS if self._engine.has_work else None
                )
                if self._stopping:
                    break
                incoming, self._incoming = list(self._incoming), deque()
                aborted, self._aborted = list(self._aborted), deque()
            for request in incoming:
                self._add(request)
            for request_id in aborted:
                self._engine.abort(request_id)
            self._step()
        self._deliver(self._engine.fail_all(_stopping_error()))
        with self._wakeup:
            clients, self._clients = self._clients, {}
        for request in self._incoming:
            if request.id in clients:
                _tell_all(clients[request.id].sink, request, _stopping_error())

    def _has_news(self) -> bool:
        return bool(self._stopping or self._incoming or self._aborted or self._engine.can_progress)

    def _wake(self) -> None:
        with self._wakeup:
            self._wakeup.notify()

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except LorafleetError as error:
            with self._wakeup:
                client = self._drop_client(request.id)
            if client is not None:
                _tell_all(client.sink, request, error)

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except DeviceLost:
            logger.exception("the device is lost")
            self._is_device_lost = True
            events = self._engine.fail_all(_device_lost_error())
        except (
            Exception
        ) as error:  # Not one request's fault that we could name: all that ran are lost, the engine is not.
            logger.exception("a step of the engine failed")
            self._faults_in_a_row += 1
            failure = Internal("engine_step_failed", f"The engine's step failed: {type(error).__name__}.")
            events = self._engine.fail_running(failure)
        else:
            if events:
                self._faults_in_a_row = self._engine.faults_in_a_row
        self._stats = self._engine.stats()
        self._deliver(events)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            with self._wakeup:
                client = self._clients.get(event.request_id)
                if client is None:
                    continue
                if event.finish_reason is not None:
                    client.unfinished -= 1
                    if client.unfinished == 0:
                        self._drop_client(event.request_id)
            try:
                client.sink(event)
            except Exception:  # A sink whose loop has closed must not end the others' streams.
                logger.exception("the sink of request %s failed", event.request_id)
                self.abort(event.request_id)


def _stopping_error() -> LorafleetError:
    return Unavailable(
        "engine_stopping", "The engine is shutting down.", retry_after_seconds=_RETRY_AFTER_SECONDS
    )


def _device_lost_error() -> LorafleetError:
    return Unavailable("device_lost", "The device that the engine computes on does not answer.")


def _tell_all(sink: EventSink, request: Request, error: LorafleetError) -> None:
    for index in range(request.sampling.n):
        sink(
            TokenEvent(
                request.id,
                index,
                finish_reason=FinishReason.ERROR,
                error=error,
                prompt_tokens=len(request.prompt_token_ids),
            )
        )
