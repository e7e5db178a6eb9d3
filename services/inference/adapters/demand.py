"""How much an adapter has been asked for lately."""

from __future__ import annotations


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
