"""The breaker of one replica, on a clock that a test moves."""

from __future__ import annotations

from services.gateway.routing.breaker import FAILURES_TO_OPEN, LONGEST_PAUSE_SECONDS, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def is_open(breaker: Breaker) -> bool:
    """Ask anew: a type checker takes a property for what it was before."""
    return breaker.is_open


def opened() -> tuple[Clock, Breaker]:
    clock = Clock()
    breaker = Breaker(clock)
    assert [breaker.fail() for _ in range(FAILURES_TO_OPEN)] == [False] * (FAILURES_TO_OPEN - 1) + [True]
    return clock, breaker


def test_failures_in_a_row_open_it() -> None:
    _, breaker = opened()
    assert is_open(breaker)


def test_an_answer_between_failures_keeps_it_closed() -> None:
    breaker = Breaker(Clock())
    for _ in range(5):
        for _ in range(FAILURES_TO_OPEN - 1):
            assert not breaker.fail()
        assert not breaker.succeed()
    assert not is_open(breaker)


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    clock, breaker = opened()
    clock.now += 1.0
    assert not is_open(breaker)
    breaker.begin()
    assert is_open(breaker), "a second request does not go with the probe"
    assert breaker.succeed()
    assert not is_open(breaker)
    assert not breaker.fail(), "failures are counted anew"


def test_failed_probes_double_the_pause_to_its_limit() -> None:
    clock, breaker = opened()
    for pause in (1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS):
        clock.now += pause - 0.01
        assert is_open(breaker)
        clock.now += 0.01
        assert not is_open(breaker)
        breaker.begin()
        assert not breaker.fail()


def test_failures_of_calls_sent_before_do_not_lengthen_the_pause() -> None:
    clock, breaker = opened()
    for _ in range(50):
        breaker.fail()
    clock.now += 1.0
    assert not is_open(breaker)
