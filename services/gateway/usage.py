"""What tenants use: requests and tokens by day, key and adapter.

Counted in memory and written to the object store every few seconds. A gateway writes its own sums of a day
under a number that grows, then removes the sums that they replace; so nothing is overwritten, and a kill
loses seconds.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

from services.common.errors import LorafleetError
from services.common.ids import new_id
from services.common.store import ObjectNotFoundError, ObjectStore

_logger = logging.getLogger("lorafleet.gateway.usage")

FLUSH_SECONDS = 5.0
BASE = ""


class Line(NamedTuple):
    """Whose use a sum is of. `adapter` is empty for the base."""

    key_id: str
    adapter: str


@dataclass(slots=True)
class Counts:
    """Sums of one line."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Counts) -> None:
        """Add another sum to this one."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens


Sums = dict[Line, Counts]


class UsageBook:
    """The use that this gateway has seen, and where all gateways' use is read."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._writer = new_id("gw")
        self._sums: dict[tuple[str, date], Sums] = defaultdict(lambda: defaultdict(Counts))
        self._changed: set[tuple[str, date]] = set()
        self._number = 0
        self._written: dict[tuple[str, date], str] = {}

    def add(self, tenant: str, line: Line, counts: Counts) -> None:
        """Count a request that has ended."""
        place = (tenant, datetime.now(UTC).date())
        self._sums[place][line].add(counts)
        self._changed.add(place)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Write what was counted every `FLUSH_SECONDS` while the body runs, and at its end."""
        task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await asyncio.to_thread(self._flush_logged)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await asyncio.to_thread(self._flush_logged)

    def _flush_logged(self) -> None:
        try:
            self.flush()
        except LorafleetError as error:
            _logger.warning("usage is not written yet", extra={"detail": error.message})

    def flush(self) -> None:
        """Write the sums that have changed; raise `Unavailable` where the store does not answer."""
        for place in list(self._changed):
            tenant, day = place
            self._changed.discard(place)
            rows = [{**line._asdict(), **asdict(counts)} for line, counts in list(self._sums[place].items())]
            self._number += 1
            key = f"{_folder(tenant, day)}{self._writer}/{self._number:012d}.json"
            try:
                self._store.put(key, json.dumps(rows).encode("utf-8"), if_absent=True)
            except LorafleetError:
                self._changed.add(place)
                raise
            before, self._written[place] = self._written.get(place), key
            if before is not None:
                self._store.delete(before)

    def read(self, tenant: str, day: date) -> Sums:
        """Return a tenant's sums of one day over all gateways, those of this one up to now."""
        newest: dict[str, str] = {}
        folder = _folder(tenant, day)
        for entry in self._store.list(folder):
            writer = entry.key.removeprefix(folder).partition("/")[0]
            newest[writer] = max(newest.get(writer, ""), entry.key)
        newest.pop(self._writer, None)
        total: Sums = defaultdict(Counts)
        for key in newest.values():
            # Replaced by newer sums in this moment: the next reading has them.
            with suppress(ObjectNotFoundError):
                for row in json.loads(self._store.get(key)):
                    line = Line(row.pop("key_id"), row.pop("adapter"))
                    total[line].add(Counts(**row))
        for line, counts in list(self._sums.get((tenant, day), {}).items()):
            total[line].add(counts)
        return total


def _folder(tenant: str, day: date) -> str:
    return f"gateway/usage/{tenant}/{day.isoformat()}/"


def as_object(counts: Counts) -> dict[str, Any]:
    """Return sums as the HTTP API shows them."""
    return {**asdict(counts), "total_tokens": counts.prompt_tokens + counts.completion_tokens}
