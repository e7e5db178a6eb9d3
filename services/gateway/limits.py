"""How much a key may ask for: requests and tokens per minute, reserved before and settled after.

Each limit is a bucket that holds one minute's worth and fills evenly. A request takes its reservation out of
the buckets, all or nothing, and gives back what it did not use; what it used beyond is taken out too, so that
a bucket may owe. The buckets lie in Redis, where all gateways share them; `LocalLimiter` is the same rule in
one process, and takes over while Redis does not answer, so that nobody is ever unlimited.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from redis.asyncio import Redis

from services.common.errors import ResourceExhausted, Unavailable
from services.common.index_connection import index_errors, open_index
from services.gateway.config import GatewaySettings
from services.gateway.keys import KeyLimits, Principal

_logger = logging.getLogger("lorafleet.gateway.limits")

MINUTE_SECONDS = 60.0
_MAX_BUCKETS = 100_000
_KEPT_SECONDS = 180


@dataclass(frozen=True, slots=True)
class Bucket:
    """One limit of one key, and what a request takes out of it."""

    key: str
    kind: str
    capacity: int
    cost: float


@dataclass(frozen=True, slots=True)
class Level:
    """What is in a bucket after a reservation, or at its refusal."""

    bucket: Bucket
    left: float

    @property
    def full_in_seconds(self) -> float:
        """How long until it is full."""
        return (self.bucket.capacity - self.left) / self.bucket.capacity * MINUTE_SECONDS

    @property
    def enough_in_seconds(self) -> float:
        """How long until it holds what was asked for."""
        missing = max(0.0, self.bucket.cost - self.left)
        return missing / self.bucket.capacity * MINUTE_SECONDS

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers about this limit."""
        return {
            f"x-ratelimit-limit-{self.bucket.kind}": str(self.bucket.capacity),
            f"x-ratelimit-remaining-{self.bucket.kind}": str(max(0, math.floor(self.left))),
            f"x-ratelimit-reset-{self.bucket.kind}": f"{self.full_in_seconds:.3f}s",
        }


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a request was granted.

    `headers` are for the answer.
    """

    buckets: tuple[Bucket, ...]
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Taking:
    """Whether all costs were taken out, and what is in the buckets now."""

    is_granted: bool
    levels: tuple[Level, ...]

    @property
    def scarcest(self) -> Level:
        """The bucket that takes longest to hold its cost."""
        return max(self.levels, key=lambda level: level.enough_in_seconds)


class RateLimited(ResourceExhausted):
    """A limit of the key is used up for now."""

    def __init__(self, taking: Taking) -> None:
        bucket = taking.scarcest.bucket
        super().__init__(
            "rate_limit_exceeded",
            f"this API key may use {bucket.capacity} {bucket.kind} a minute",
            limit=bucket.capacity,
            retry_after_seconds=taking.scarcest.enough_in_seconds,
        )
        self.headers = headers_of(taking.levels)


class Limiter(Protocol):
    """Keeps the buckets."""

    async def take(self, buckets: Sequence[Bucket]) -> Taking:
        """Take every bucket's cost out of it, or nothing where one holds too little."""
        ...

    async def give_back(self, bucket: Bucket, amount: float) -> None:
        """Put `amount` into a bucket, up to its capacity; take it out where it is negative."""
        ...


class LocalLimiter:
    """Buckets of this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def take(self, buckets: Sequence[Bucket]) -> Taking:
        """As `Limiter.take`."""
        levels = tuple(Level(bucket, self._level(bucket)) for bucket in buckets)
        if any(level.left < level.bucket.cost for level in levels):
            return Taking(False, levels)
        after = tuple(Level(level.bucket, level.left - level.bucket.cost) for level in levels)
        for level in after:
            self._store(level.bucket, level.left)
        return Taking(True, after)

    async def give_back(self, bucket: Bucket, amount: float) -> None:
        """As `Limiter.give_back`."""
        self._store(bucket, min(float(bucket.capacity), self._level(bucket) + amount))

    def _level(self, bucket: Bucket) -> float:
        left, at = self._buckets.get(bucket.key, (float(bucket.capacity), self._clock()))
        filled = (self._clock() - at) * bucket.capacity / MINUTE_SECONDS
        return min(float(bucket.capacity), left + filled)

    def _store(self, bucket: Bucket, left: float) -> None:
        self._buckets[bucket.key] = (left, self._clock())
        self._buckets.move_to_end(bucket.key)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)


# KEYS: the buckets. ARGV: "take" or "give", the seconds that they are kept, then capacity and cost of each.
# Returns 1 or 0, then the levels.
#
# Its writes are neither logged nor replicated: a server that syncs its log before each answer would make
# every request wait for the disk, and all that a lost bucket costs is that it is full again.
_SCRIPT = """
redis.set_repl(redis.REPL_NONE)
local now = redis.call('TIME')
local seconds = tonumber(now[1]) + tonumber(now[2]) / 1e6
local levels, enough = {}, 1
for i, key in ipairs(KEYS) do
  local capacity, cost = tonumber(ARGV[2 * i + 1]), tonumber(ARGV[2 * i + 2])
  local found = redis.call('HMGET', key, 'left', 'at')
  local left = capacity
  if found[1] then
    left = math.min(capacity, tonumber(found[1]) + (seconds - tonumber(found[2])) * capacity / 60)
  end
  if ARGV[1] == 'take' and left < cost then enough = 0 end
  levels[i] = left
end
local answer = {enough}
for i, key in ipairs(KEYS) do
  local capacity, cost = tonumber(ARGV[2 * i + 1]), tonumber(ARGV[2 * i + 2])
  local left = levels[i]
  if ARGV[1] == 'give' then left = math.min(capacity, left + cost) end
  if ARGV[1] == 'take' and enough == 1 then left = left - cost end
  if ARGV[1] == 'give' or enough == 1 then
    redis.call('HSET', key, 'left', string.format('%.6f', left), 'at', string.format('%.6f', seconds))
    redis.call('EXPIRE', key, ARGV[2])
  end
  answer[i + 1] = string.format('%.6f', left)
end
return answer
"""


class SharedLimiter:
    """Buckets in Redis; the ones of this process while it does not answer."""

    def __init__(self, redis: Redis, fallback: LocalLimiter) -> None:
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self._fallback = fallback
        self._is_away = False

    async def take(self, buckets: Sequence[Bucket]) -> Taking:
        """As `Limiter.take`."""
        try:
            with index_errors():
                answer = await self._run("take", [(bucket, bucket.cost) for bucket in buckets])
        except Unavailable as error:
            self._note(is_away=True, detail=error.message)
            return await self._fallback.take(buckets)
        self._note(is_away=False)
        levels = tuple(Level(bucket, float(left)) for bucket, left in zip(buckets, answer[1:], strict=True))
        return Taking(int(answer[0]) == 1, levels)

    async def give_back(self, bucket: Bucket, amount: float) -> None:
        """As `Limiter.give_back`."""
        try:
            with index_errors():
                await self._run("give", [(bucket, amount)])
        except Unavailable:
            await self._fallback.give_back(bucket, amount)

    async def _run(self, verb: str, amounts: Sequence[tuple[Bucket, float]]) -> list[bytes]:
        numbers = [f"{number:.6f}" for bucket, amount in amounts for number in (bucket.capacity, amount)]
        keys = [f"gateway:limit:{bucket.key}" for bucket, _ in amounts]
        answer: list[bytes] = await self._script(keys=keys, args=[verb, _KEPT_SECONDS, *numbers])
        return answer

    def _note(self, *, is_away: bool, detail: str = "") -> None:
        if is_away != self._is_away:
            self._is_away = is_away
            text = "limits are kept by this process alone" if is_away else "limits are shared again"
            _logger.warning(text, extra={"detail": detail})


async def reserve(limiter: Limiter, principal: Principal, tokens: int) -> Reservation:
    """Take one request and `tokens` out of the key's limits.

    A reservation above the whole limit of tokens takes all of it: such a request runs when it is full.

    Raises:
        RateLimited: `rate_limit_exceeded`, with the time after which it will do.
    """
    buckets = _buckets(principal.key_id, principal.limits, tokens)
    if not buckets:
        return Reservation((), {})
    taking = await limiter.take(buckets)
    if not taking.is_granted:
        raise RateLimited(taking)
    return Reservation(tuple(buckets), headers_of(taking.levels))


async def settle(limiter: Limiter, reservation: Reservation, used_tokens: int) -> None:
    """Give back the reserved tokens that were not used, or take out those used beyond."""
    for bucket in reservation.buckets:
        if bucket.kind == "tokens" and bucket.cost != used_tokens:
            await limiter.give_back(bucket, bucket.cost - used_tokens)


def headers_of(levels: Sequence[Level]) -> dict[str, str]:
    """Return the headers about all limits of a key."""
    return {name: value for level in levels for name, value in level.headers().items()}


def _buckets(key_id: str, limits: KeyLimits, tokens: int) -> list[Bucket]:
    buckets = []
    if limits.requests_per_minute is not None:
        buckets.append(Bucket(f"{key_id}:requests", "requests", limits.requests_per_minute, 1.0))
    if limits.tokens_per_minute is not None:
        cost = float(min(tokens, limits.tokens_per_minute))
        buckets.append(Bucket(f"{key_id}:tokens", "tokens", limits.tokens_per_minute, cost))
    return buckets


@asynccontextmanager
async def limiter(settings: GatewaySettings) -> AsyncIterator[Limiter]:
    """Yield the limiter that the settings ask for: shared by Redis, or of this process."""
    local = LocalLimiter()
    if settings.redis_url is None:
        yield local
        return
    redis = open_index(settings.redis_url)
    try:
        yield SharedLimiter(redis, local)
    finally:
        await redis.aclose()
