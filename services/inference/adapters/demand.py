"""How much each adapter has been asked for lately."""

from __future__ import annotations

from collections import OrderedDict

_MAX_REMEMBERED = 65536


class Demand:
    """A count of requests that halves every `half_life_seconds`."""

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life_seconds = half_life_seconds
        self._count = 0.0
        self._at_seconds = 0.0

    def add(self, now_seconds: float) -> None:
        """Count one request."""
        self._count = self.at(now_seconds) + 1.0
        self._at_seconds = now_seconds

    def at(self, now_seconds: float) -> float:
        """Return the decayed count."""
        age_seconds = now_seconds - self._at_seconds
        return float(self._count * 0.5 ** (age_seconds / self._half_life_seconds))


class DemandHistory:
    """The demand of adapters by digest, of evicted ones too: one that comes back is not taken for new.

    Bounded; the adapter that was asked for longest ago is forgotten first.
    """

    def __init__(self, half_life_seconds: float, limit: int = _MAX_REMEMBERED) -> None:
        self._half_life_seconds = half_life_seconds
        self._limit = limit
        self._demands: OrderedDict[str, Demand] = OrderedDict()

    def of(self, digest: str) -> Demand:
        """Return the demand of `digest`, which counts as asked for now."""
        demand = self._demands.setdefault(digest, Demand(self._half_life_seconds))
        self._demands.move_to_end(digest)
        while len(self._demands) > self._limit:
            self._demands.popitem(last=False)
        return demand
