"""Labels of metrics whose number is bounded, whatever callers send."""

from __future__ import annotations

OTHER = "other"


class BoundedLabels:
    """Gives the first `limit` values a label of their own, and all others one together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        """Return the label of `value`."""
        if value not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(value)
        return value
