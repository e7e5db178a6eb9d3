"""One adapter in the cache: where it is, who holds it, and what it cost to load."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from services.common.errors import LorafleetError
from services.inference.adapters.demand import Demand
from services.inference.adapters.stages import LoadTimes
from services.inference.adapters.weights import AdapterWeights


class AdapterState(enum.Enum):
    """Where an adapter is."""

    FETCHING = "fetching"
    HOST = "host"
    DEVICE = "device"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AdapterResidency:
    """One adapter as an operator sees it. Disk-only adapters are not listed.

    `pins` counts the sequences that run on it; `kept` tells that an operator holds it on the device.
    `last_use_at` and `retry_at` are on the cache's clock; `retry_at` and `error` are those of a failed load.
    """

    digest: str
    state: AdapterState
    size_bytes: int
    leases: int
    pins: int
    kept: bool
    load_seconds: float
    last_use_at: float
    error: LorafleetError | None = None
    retry_at: float = 0.0


@dataclass(eq=False, slots=True)
class AdapterEntry:
    """The cache's own record of one adapter; guarded by the cache's lock.

    Attributes:
        leases: requests that hold it.
        kept: whether an operator wants it on the device until further notice.
        reserved_bytes: its part of the host's bytes; `size_bytes` as soon as it loads.
        times: how long each stage of its load took.
        asked_at: when its load was asked for.
        failed_until: when a failed load may be tried again.
    """

    digest: str
    demand: Demand
    state: AdapterState = AdapterState.FETCHING
    leases: int = 0
    kept: bool = False
    weights: AdapterWeights | None = None
    size_bytes: int = 0
    reserved_bytes: int = 0
    times: LoadTimes = field(default_factory=LoadTimes)
    asked_at: float = 0.0
    last_use_at: float = 0.0
    error: LorafleetError | None = None
    failed_until: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it is on the host and nobody holds it."""
        return self.weights is not None and not self.leases and not self.kept
