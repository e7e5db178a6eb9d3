"""Reading what replicas tell of themselves in Redis (docs/replica-keys.md)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from redis.asyncio import Redis

from services.common.index_connection import index_errors
from services.gateway.routing.replica import Report

_logger = logging.getLogger("lorafleet.gateway.routing")

REPLICAS_KEY = "inference:replicas"


class Load(BaseModel):
    """What a router needs of a replica's load key."""

    address: str
    base_model: str
    draining: bool
    running: int
    queued: int
    waiting_for_adapter: int
    max_running: int
    update_time_ms: int


class PresenceReader:
    """Reads the reports of all replicas; an adapter hash is read again only when its replica has written."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._known: dict[str, Report] = {}

    async def read(self) -> list[Report]:
        """Return the reports of the replicas that live, the latest for each address.

        Raises:
            Unavailable: `store_unavailable`.
        """
        with index_errors():
            found: list[Any] = await self._redis.zrange(REPLICAS_KEY, 0, -1)
            ids = [replica_id.decode() for replica_id in found]
            texts: list[Any] = await self._redis.mget([_load_key(name) for name in ids]) if ids else []
            loads = _loads(ids, texts)
            stale = [replica_id for replica_id, load in loads.items() if self._is_news(replica_id, load)]
            adapters = await self._adapters(stale)
        known = {replica_id: self._known[replica_id] for replica_id in loads if replica_id not in adapters}
        for replica_id, digests in adapters.items():
            known[replica_id] = _report(replica_id, loads[replica_id], digests)
        self._known = known
        # A replica that was killed and started again is told of twice until its first keys end.
        latest: dict[str, Report] = {}
        for report in sorted(known.values(), key=lambda report: report.update_time_ms):
            latest[report.address] = report
        return list(latest.values())

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _is_news(self, replica_id: str, load: Load) -> bool:
        known = self._known.get(replica_id)
        return known is None or known.update_time_ms != load.update_time_ms

    async def _adapters(self, replica_ids: Sequence[str]) -> dict[str, frozenset[str]]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for replica_id in replica_ids:
                pipe.hkeys(f"{_load_key(replica_id)}:adapters")
            answers = await pipe.execute()
        return {
            replica_id: frozenset(digest.decode() for digest in digests)
            for replica_id, digests in zip(replica_ids, answers, strict=True)
        }


def _load_key(replica_id: str) -> str:
    return f"inference:replica:{replica_id}"


def _loads(ids: Sequence[str], texts: Sequence[bytes | None]) -> dict[str, Load]:
    """Return the loads of the replicas that live; one that cannot be read is of a version that we are not."""
    loads: dict[str, Load] = {}
    for replica_id, text in zip(ids, texts, strict=True):
        if text is not None:
            try:
                loads[replica_id] = Load.model_validate_json(text)
            except ValidationError as error:
                _logger.warning(
                    "a replica's load cannot be read", extra={"replica": replica_id, "detail": str(error)}
                )
    return loads


def _report(replica_id: str, load: Load, adapters: frozenset[str]) -> Report:
    return Report(
        replica_id=replica_id,
        address=load.address,
        base=load.base_model,
        is_draining=load.draining,
        load=load.running + load.queued + load.waiting_for_adapter,
        slots=load.max_running,
        adapters=adapters,
        update_time_ms=load.update_time_ms,
    )
