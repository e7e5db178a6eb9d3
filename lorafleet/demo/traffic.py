"""Completion requests to the HTTP API, many at a time, each with its timings."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from lorafleet.api import ApiError, api_error, authorization, event_data, unreachable

_ANSWER_SECONDS = 300.0
# Between a failed request of a load and the next: a service that is away comes back within seconds.
_FAILURE_PAUSE_SECONDS = 0.5
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy completion: to which model, of what, ending where."""

    model: str
    prompt: str
    max_tokens: int
    stop: tuple[str, ...]


@dataclass(slots=True)
class Answer:
    """What came back, and when: seconds of the monotonic clock."""

    ask: Ask
    text: str = ""
    tokens: int = 0
    began_at: float = 0.0
    piece_times: list[float] = field(default_factory=list)
    ended_at: float = 0.0

    @property
    def first_piece_seconds(self) -> float:
        """From the request to its first text, or to its end where it had none."""
        return (self.piece_times[0] if self.piece_times else self.ended_at) - self.began_at

    @property
    def piece_gaps_seconds(self) -> list[float]:
        """Between one piece of text and the next."""
        return [later - earlier for earlier, later in itertools.pairwise(self.piece_times)]


@dataclass(slots=True)
class Round:
    """What a load brought back: the answers, and how many requests failed for which reason."""

    answers: list[Answer] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


class Traffic:
    """Sends completion requests to one fleet."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    @classmethod
    @asynccontextmanager
    async def to(cls, base_url: str, api_key: str) -> AsyncIterator[Traffic]:
        """Open connections for a while."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=base_url, headers=authorization(api_key), timeout=_ANSWER_SECONDS, limits=limits
        ) as client:
            yield cls(client)

    async def ask(self, ask: Ask) -> Answer:
        """Stream one completion to its end.

        Raises:
            ApiError: it was refused, broke off, or could not be sent.
        """
        answer = Answer(ask, began_at=time.monotonic())
        body = {
            "model": ask.model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "stop": list(ask.stop),
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._client.stream("POST", "/completions", json=body) as response:
                if response.is_error:
                    raise api_error(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    _take(answer, line)
        except httpx.TransportError as error:
            raise unreachable(error) from error
        answer.ended_at = time.monotonic()
        return answer

    async def ask_all(self, asks: Sequence[Ask], *, at_once: int) -> list[Answer]:
        """Stream every completion, at most `at_once` at a time, and return the answers in order."""
        gate = asyncio.Semaphore(at_once)

        async def gated(ask: Ask) -> Answer:
            async with gate:
                return await self.ask(ask)

        return await together(gated(ask) for ask in asks)

    async def keep_asking(self, asks: Sequence[Ask], *, at_once: int, seconds: float) -> Round:
        """Keep `at_once` completions going for `seconds`, round and round.

        A request that fails is counted and not sent again; the load goes on.

        Raises:
            ApiError: not one request was answered; it is the last one's error.
        """
        until = time.monotonic() + seconds
        queue = itertools.cycle(asks)
        came = Round()

        async def stream() -> ApiError | None:
            last_error = None
            while time.monotonic() < until:
                try:
                    came.answers.append(await self.ask(next(queue)))
                except ApiError as error:
                    last_error = error
                    came.failures[error.code] += 1
                    await asyncio.sleep(_FAILURE_PAUSE_SECONDS)
            return last_error

        errors = [error for error in await together(stream() for _ in range(at_once)) if error]
        if errors and not came.answers:
            raise errors[-1]
        return came


async def together(coroutines: Iterable[Coroutine[None, None, ResultT]]) -> list[ResultT]:
    """Run all at the same time; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def _take(answer: Answer, line: str) -> None:
    chunk = event_data(line)
    if chunk is None:
        return
    for choice in chunk["choices"]:
        if choice["text"]:
            answer.text += choice["text"]
            answer.piece_times.append(time.monotonic())
    if chunk.get("usage"):
        answer.tokens = int(chunk["usage"]["completion_tokens"])
