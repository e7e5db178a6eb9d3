"""The inference replicas of one base: those of the settings, and those that tell of themselves in Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import grpc

from services.common.errors import LorafleetError
from services.gateway.routing.presence import PresenceReader
from services.gateway.routing.replica import Replica, Report

_logger = logging.getLogger("lorafleet.gateway.routing")

READ_INTERVAL_SECONDS = 0.25
PAUSE_SECONDS = 1.0
_NO_HOLDERS: Mapping[str, None] = {}


class Fleet:
    """What a policy looks at, kept up to date by `run`."""

    def __init__(
        self,
        targets: Sequence[str],
        open_to: Callable[[str], grpc.aio.Channel],
        *,
        base: str | None = None,
        presence: PresenceReader | None = None,
        linger_seconds: float = 0.0,
    ) -> None:
        """Begin with the configured replicas.

        Args:
            targets: addresses of the configured replicas; they stay members whatever is heard of them.
            open_to: opens a channel to an address.
            base: name of the base whose replicas join as soon as they tell of themselves; none do without it.
            presence: where replicas tell of themselves.
            linger_seconds: how long calls to a replica that is gone may go on.
        """
        self._open_to = open_to
        self._base = base
        self._presence = presence
        self._linger_seconds = linger_seconds
        self._replicas = {target: Replica(target, open_to(target), True) for target in targets}
        self._closing: set[asyncio.Task[None]] = set()
        self._holders: dict[str, dict[str, None]] = {}
        self._members: tuple[str, ...] = ()
        self._taking: frozenset[str] = frozenset()
        self._told_load = 0
        self._in_flight = 0
        self._note_members()

    @property
    def members(self) -> Sequence[str]:
        """The replicas that take new requests; those that drain stand in only where there are no others."""
        return self._members

    @property
    def outstanding(self) -> int:
        """Requests that run or wait on all replicas."""
        return max(self._in_flight, self._told_load + self._in_flight)

    @property
    def replicas(self) -> Sequence[Replica]:
        """All replicas, those that drain too."""
        return tuple(self._replicas.values())

    def takes(self, replica: str) -> bool:
        """Whether the replica is one of the members."""
        return replica in self._taking

    def load(self, replica: str) -> int:
        """Return how many requests run or wait there."""
        return self._replicas[replica].load

    def slots(self, replica: str) -> int:
        """Return how many requests run there at once."""
        return self._replicas[replica].slots

    def holders(self, adapter: str) -> Collection[str]:
        """Return the members that hold the adapter."""
        return self._holders.get(adapter, _NO_HOLDERS)

    def replica(self, address: str) -> Replica:
        """Return a member."""
        return self._replicas[address]

    def begin(self, replica: Replica) -> None:
        """Note that a request is sent."""
        replica.in_flight += 1
        self._in_flight += 1

    def end(self, replica: Replica) -> None:
        """Note that a request has ended."""
        replica.in_flight -= 1
        self._in_flight -= 1

    async def run(self) -> None:
        """Hear what replicas tell, until cancelled; while Redis is away, what was heard last stays true."""
        is_heard = True
        while self._presence is not None:
            try:
                self.hear(await self._presence.read())
                is_heard = True
                await asyncio.sleep(READ_INTERVAL_SECONDS)
            except LorafleetError as error:
                if is_heard:
                    _logger.warning("replicas cannot be heard", extra={"detail": str(error)})
                is_heard = False
                await asyncio.sleep(PAUSE_SECONDS)

    def hear(self, reports: Iterable[Report]) -> None:
        """Take the reports of all replicas that live."""
        told = {report.address: report for report in reports}
        for address, report in told.items():
            if address not in self._replicas and self._base is not None and report.base == self._base:
                _logger.info("a replica joins", extra={"replica": address})
                self._replicas[address] = Replica(address, self._open_to(address), False)
        for address, replica in list(self._replicas.items()):
            replica.hear(told.get(address))
            if replica.report is None and not replica.is_configured:
                _logger.info("a replica is gone", extra={"replica": address})
                self._part_with(address)
        self._note_members()

    async def close(self) -> None:
        """Close all channels; calls still running end at once."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        for replica in self._replicas.values():
            await replica.channel.close(None)
        if self._presence is not None:
            await self._presence.close()

    def _part_with(self, address: str) -> None:
        channel = self._replicas.pop(address).channel
        task = asyncio.create_task(channel.close(self._linger_seconds))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _note_members(self) -> None:
        """Work out once what every request asks for."""
        open_ones = [replica for replica in self._replicas.values() if not replica.is_draining]
        members = tuple(sorted(replica.address for replica in open_ones or self._replicas.values()))
        if members != self._members:
            self._members, self._taking = members, frozenset(members)
        holders: dict[str, dict[str, None]] = {}
        for address in members:
            report = self._replicas[address].report
            for digest in report.adapters if report is not None else ():
                holders.setdefault(digest, {})[address] = None
        self._holders = holders
        self._told_load = sum(self._replicas[address].load for address in members) - self._in_flight
