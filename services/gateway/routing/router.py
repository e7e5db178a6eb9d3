"""Sending a call to a replica, and to another one where that is safe."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Set
from typing import TypeVar

import grpc

from services.common import status
from services.common.errors import Unavailable
from services.gateway.routing.fleet import Fleet
from services.gateway.routing.policy import Policy
from services.gateway.routing.replica import Replica

_logger = logging.getLogger("lorafleet.gateway.routing")

MAX_ATTEMPTS = 3
PAUSE_SECONDS = 0.3
# Those that wait for a replica try in turn; more of them would keep it from starting.
MAX_WAITING = 256
# Refusals of a replica that another one need not share.
_ONLY_THERE = frozenset({"base_loading", "engine_stopping", "device_lost"})
_BUSY = frozenset({"queue_full"})

Answer = TypeVar("Answer")


class Router:
    """Chooses by the policy, minds the breakers, and tries elsewhere as long as no answer has begun.

    Where no replica can be reached it waits: one that was killed is back before most clients have given up.
    What lasts longer than a restart is told at once.
    """

    def __init__(self, fleet: Fleet, policy: Policy, *, patience_seconds: float = 0.0) -> None:
        """Route over `fleet`; calls wait for a replica until none has answered for `patience_seconds`."""
        self.fleet = fleet
        self._policy = policy
        self._patience_seconds = patience_seconds
        self._failing: set[str] = set()
        self._num_waiting = 0
        self._unreachable_since: float | None = None

    async def send(self, adapter: str, attempt: Callable[[Replica], Awaitable[Answer]]) -> Answer:
        """Make an attempt on one replica after the other, until one answers or says what all would say.

        Args:
            adapter: digest of the adapter; empty where any replica will do.
            attempt: makes the call and returns when its answer has begun.

        Raises:
            Unavailable: `no_replica`; there is none.
            grpc.aio.AioRpcError: what the last replica said.
        """
        while True:
            try:
                answer = await self._send_to_one(adapter, attempt)
            except (grpc.aio.AioRpcError, Unavailable) as error:
                if not isinstance(error, Unavailable) and not _is_its_own(error):
                    self._unreachable_since = None
                    raise
                if not self._may_wait():
                    raise
            else:
                self._unreachable_since = None
                return answer
            self._num_waiting += 1
            try:
                await asyncio.sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - spreads them
            finally:
                self._num_waiting -= 1

    def _may_wait(self) -> bool:
        """Whether a call that no replica has taken is to be tried again."""
        now = time.monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
        return now < self._unreachable_since + self._patience_seconds and self._num_waiting < MAX_WAITING

    async def _send_to_one(self, adapter: str, attempt: Callable[[Replica], Awaitable[Answer]]) -> Answer:
        tried: set[str] = set()
        while True:
            replica = self._choose(adapter, tried)
            replica.breaker.begin()
            try:
                answer = await attempt(replica)
            except grpc.aio.AioRpcError as error:
                self.note_failure(replica, error)
                tried.add(replica.address)
                untried = [other for other in self.fleet.members if other not in tried]
                if not _may_go_elsewhere(error) or not untried or len(tried) >= MAX_ATTEMPTS:
                    raise
                _logger.info(
                    "a call goes to another replica",
                    extra={"replica": replica.address, "code": error.code().name},
                )
            else:
                if replica.breaker.succeed():
                    self._failing.discard(replica.address)
                    _logger.info("a replica answers again", extra={"replica": replica.address})
                return answer

    def note_failure(self, replica: Replica, error: grpc.aio.AioRpcError) -> None:
        """Count an error of a call against the replica, where it is the replica's own."""
        if _is_its_own(error) and replica.breaker.fail():
            self._failing.add(replica.address)
            _logger.warning("a replica fails; it is left alone", extra={"replica": replica.address})

    def _choose(self, adapter: str, tried: Set[str]) -> Replica:
        shunned = {address for address in self._failing if self._is_shunned(address)}
        # Where every breaker is open, a replica that may fail is better than a refusal that is certain.
        chosen = self._policy.choose(adapter, self.fleet, tried | shunned) or self._policy.choose(
            adapter, self.fleet, tried
        )
        if chosen is None:
            raise Unavailable(
                "no_replica", "no inference service is there for this base", retry_after_seconds=1
            )
        return self.fleet.replica(chosen)

    def _is_shunned(self, address: str) -> bool:
        return self.fleet.takes(address) and self.fleet.replica(address).breaker.is_open


def _is_its_own(error: grpc.aio.AioRpcError) -> bool:
    """Whether the replica itself failed: its connection did, or it says so."""
    if status.is_ours(error):
        return status.from_rpc_error(error).reason in _ONLY_THERE
    return error.code() is grpc.StatusCode.UNAVAILABLE


def _may_go_elsewhere(error: grpc.aio.AioRpcError) -> bool:
    is_busy = status.is_ours(error) and status.from_rpc_error(error).reason in _BUSY
    return is_busy or _is_its_own(error)
