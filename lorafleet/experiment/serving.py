"""Has the base and all adapters answer the test rows, mixed, through the public HTTP API."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lorafleet.api import ApiError
from lorafleet.demo.traffic import Ask, Traffic, together
from lorafleet.experiment.experiment import EVERY_RUN, PATIENCE_SECONDS
from lorafleet.experiment.served import Replies, Reply

_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ServingStanding:
    """How far serving is: answers that are there, of all, and what came in this process, over `seconds`."""

    done: int
    total: int
    models: int
    tokens: int
    seconds: float


async def serve_all(
    base_url: str,
    api_key: str,
    asks: Sequence[Sequence[Ask]],
    replies: Replies,
    *,
    at_once: int,
    show: Callable[[ServingStanding], None],
) -> None:
    """Ask for every answer that is not in `replies`, `at_once` at a time, the models taking turns.

    A request that is refused for itself is an answer without text; one that fails for now is sent again.

    Raises:
        ApiError: the key is refused, or the fleet did not answer for minutes.
    """
    every = list(dict.fromkeys(mixed(asks)))
    missing = [ask for ask in every if ask not in replies]
    waiting = iter(missing)
    models = len({ask.model for ask in every})
    done, tokens, began_at = len(every) - len(missing), 0, time.monotonic()

    async def stream(traffic: Traffic) -> None:
        nonlocal done, tokens
        for ask in waiting:
            reply = await _patiently(traffic, ask)
            replies.add(ask, reply)
            done, tokens = done + 1, tokens + reply.tokens
            show(ServingStanding(done, len(every), models, tokens, time.monotonic() - began_at))

    async with Traffic.to(base_url, api_key) as traffic:
        await together(stream(traffic) for _ in range(at_once))


def mixed(asks: Iterable[Sequence[Ask]]) -> Iterator[Ask]:
    """Yield one request of each model in turn, so that a batch holds as many models as it can."""
    for turn in itertools.zip_longest(*asks):
        yield from (ask for ask in turn if ask is not None)


async def _patiently(traffic: Traffic, ask: Ask) -> Reply:
    began_at = time.monotonic()
    while True:
        try:
            answer = await traffic.ask(ask)
        except ApiError as error:
            if not error.is_passing and error.code not in EVERY_RUN:
                return Reply("", 0, error.code)
            if error.code in EVERY_RUN or time.monotonic() - began_at > PATIENCE_SECONDS:
                raise
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            return Reply(answer.text, answer.tokens)
