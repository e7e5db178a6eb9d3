"""Limits: two limiters that agree, a race at the last unit, and what happens without Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from redis.asyncio import Redis

from services.common.errors import ResourceExhausted
from services.common.index_connection import open_index
from services.gateway.keys import KeyLimits, Principal
from services.gateway.limits import (
    Bucket,
    Limiter,
    LocalLimiter,
    RateLimited,
    SharedLimiter,
    reserve,
    settle,
)


def principal(requests: int | None = None, tokens: int | None = None, key: str = "k") -> Principal:
    return Principal(key, "acme", frozenset(), KeyLimits(requests, tokens))


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["local", "shared"])
async def limiter(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[Limiter]:
    if request.param == "local":
        yield LocalLimiter()
        return
    index = open_index(SecretStr(redis_url))
    await index.flushdb()
    yield SharedLimiter(index, LocalLimiter())
    await index.aclose()


async def test_no_limits_cost_nothing_and_say_nothing(limiter: Limiter) -> None:
    assert (await reserve(limiter, principal(), 10**9)).headers == {}


async def test_row_96_requests_run_out_with_headers(limiter: Limiter) -> None:
    who = principal(requests=3)
    left = [(await reserve(limiter, who, 1)).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    with pytest.raises(RateLimited) as caught:
        await reserve(limiter, who, 1)
    error = caught.value
    assert error.reason == "rate_limit_exceeded"
    # One request every 20 seconds.
    assert error.retry_after_seconds == pytest.approx(20, abs=1)
    assert error.headers["x-ratelimit-limit-requests"] == "3"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert 59 < float(error.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 60


async def test_row_96_a_race_at_the_last_unit_is_won_once(limiter: Limiter) -> None:
    who = principal(requests=100, tokens=1000)
    for _ in range(9):
        await reserve(limiter, who, 100)

    async def one() -> bool:
        try:
            await reserve(limiter, who, 100)
        except ResourceExhausted:
            return False
        return True

    # What fills in during the race is far below another reservation.
    assert sum(await asyncio.gather(*(one() for _ in range(80)))) == 1


async def test_what_is_not_used_comes_back_and_what_is_used_beyond_is_owed(limiter: Limiter) -> None:
    who = principal(tokens=1000)
    first = await reserve(limiter, who, 900)
    await settle(limiter, first, 100)
    second = await reserve(limiter, who, 800)
    assert int(second.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(100, abs=3)
    await settle(limiter, second, 2000)
    with pytest.raises(RateLimited) as caught:
        await reserve(limiter, who, 10)
    # 1100 are owed and 10 wanted: 66.6 seconds at 1000 a minute.
    assert caught.value.retry_after_seconds == pytest.approx(66.6, abs=1)


async def test_a_request_above_the_whole_limit_runs_when_the_bucket_is_full() -> None:
    clock = Clock()
    limiter = LocalLimiter(clock)
    who = principal(tokens=100)
    await reserve(limiter, who, 5000)
    with pytest.raises(RateLimited):
        await reserve(limiter, who, 5000)
    clock.now += 60
    await reserve(limiter, who, 5000)


async def test_nothing_is_taken_from_one_limit_where_the_other_refuses(limiter: Limiter) -> None:
    who = principal(requests=5, tokens=100)
    await reserve(limiter, who, 100)
    for _ in range(10):
        with pytest.raises(RateLimited):
            await reserve(limiter, who, 50)
    with pytest.raises(RateLimited) as caught:
        await reserve(limiter, who, 50)
    assert caught.value.headers["x-ratelimit-remaining-requests"] == "4"


Act = tuple[str, float]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    capacity=st.integers(1, 50),
    acts=st.lists(st.tuples(st.sampled_from(["take", "give"]), st.floats(-20, 60)), max_size=20),
)
async def test_both_limiters_follow_one_rule(redis_url: str, capacity: int, acts: list[Act]) -> None:
    index: Redis = open_index(SecretStr(redis_url))
    shared, local = SharedLimiter(index, LocalLimiter()), LocalLimiter()
    await index.delete("gateway:limit:twin")
    try:
        for verb, amount in acts:
            bucket = Bucket("twin", "tokens", capacity, min(abs(amount), capacity))
            if verb == "give":
                await shared.give_back(bucket, amount)
                await local.give_back(bucket, amount)
                continue
            there, here = await shared.take([bucket]), await local.take([bucket])
            # Milliseconds pass between the two, in which a bucket fills by next to nothing.
            assert there.levels[0].left == pytest.approx(here.levels[0].left, abs=0.5 + capacity * 0.02) or (
                there.is_granted != here.is_granted
            )
            if there.is_granted != here.is_granted:
                assert abs(here.levels[0].left - there.levels[0].left) <= bucket.cost + 1
                return
    finally:
        await index.aclose()


async def test_row_97_without_redis_the_limits_are_this_process_s_own() -> None:
    away = open_index(SecretStr("redis://127.0.0.1:1/0"))
    limiter = SharedLimiter(away, LocalLimiter())
    who = principal(requests=2)
    try:
        reservation = await reserve(limiter, who, 1)
        await settle(limiter, reservation, 0)
        await reserve(limiter, who, 1)
        with pytest.raises(RateLimited):
            await reserve(limiter, who, 1)
    finally:
        await away.aclose()


async def test_the_buckets_wait_for_no_disk(redis_url: str) -> None:
    """The server syncs its log before it answers a write; what is not logged is not waited for."""
    index = open_index(SecretStr(redis_url))
    limiter = SharedLimiter(index, LocalLimiter())
    who = principal(requests=10, tokens=1000)
    try:
        await index.set("logged", 1)
        before = (await index.info("persistence"))["aof_current_size"]
        reservation = await reserve(limiter, who, 100)
        await settle(limiter, reservation, 40)
        assert (await index.info("persistence"))["aof_current_size"] == before
        assert (await reserve(limiter, who, 1)).headers["x-ratelimit-remaining-tokens"] in ("959", "960")
        await index.set("logged", 2)
        assert (await index.info("persistence"))["aof_current_size"] > before
    finally:
        await index.aclose()
