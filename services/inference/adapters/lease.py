"""One request's hold on one adapter version."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import LorafleetError
from services.inference.adapters.entry import AdapterEntry
from services.inference.adapters.weights import AdapterWeights

if TYPE_CHECKING:
    from services.inference.adapters.cache import AdapterCache


class Lease:
    """Keeps the adapter on the host once it is there. Given back exactly once, by `release`."""

    def __init__(self, cache: AdapterCache, entry: AdapterEntry) -> None:
        self._cache = cache
        self._entry = entry
        self._released = False

    @property
    def digest(self) -> str:
        return self._entry.digest

    @property
    def ready(self) -> bool:
        """Whether the weights are on the host, so that `pin` may succeed."""
        return self._entry.weights is not None

    @property
    def error(self) -> LorafleetError | None:
        """Why the load failed, if it did."""
        return self._entry.error

    def pin(self) -> AdapterWeights | None:
        """Put the adapter on the device and hold it there; None where the device has no room now."""
        return self._cache.pin(self._entry)

    def unpin(self) -> None:
        """Give one pin back."""
        self._cache.unpin(self._entry)

    def release(self) -> None:
        """Give the lease back."""
        assert not self._released, "a lease was released twice"
        self._released = True
        self._cache.release(self._entry)
