"""One inference replica as this gateway sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from services.gateway.routing.breaker import Breaker

UNKNOWN_SLOTS = 32


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica tells of itself (docs/replica-keys.md).

    Attributes:
        load: requests that run or wait there, of all gateways.
        slots: sequences of one batch.
        adapters: digests of the adapters in its memory.
        update_time_ms: when it was written, by the replica's clock.
    """

    replica_id: str
    address: str
    base: str
    is_draining: bool
    load: int
    slots: int
    adapters: frozenset[str]
    update_time_ms: int


@dataclass(slots=True)
class Replica:
    """A channel, what was last heard of the replica behind it, and how our calls there went."""

    address: str
    channel: grpc.aio.Channel
    is_configured: bool
    breaker: Breaker = field(default_factory=Breaker)
    report: Report | None = None
    in_flight: int = 0
    _in_flight_at_report: int = 0

    @property
    def is_draining(self) -> bool:
        """Whether it takes no new requests."""
        return self.report is not None and self.report.is_draining

    @property
    def slots(self) -> int:
        """Sequences that run at once."""
        return self.report.slots if self.report is not None else UNKNOWN_SLOTS

    @property
    def load(self) -> int:
        """Requests that run or wait there: as told, and by what we have sent and seen end since."""
        told = 0 if self.report is None else self.report.load - self._in_flight_at_report
        return max(self.in_flight, told + self.in_flight)

    def hear(self, report: Report | None) -> None:
        """Take what the replica tells; None where nothing is heard of it."""
        if report is None or self.report is None or report.update_time_ms != self.report.update_time_ms:
            self._in_flight_at_report = self.in_flight
        self.report = report
