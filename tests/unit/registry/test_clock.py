"""Row 136: the registry's time passes steadily, whatever the system's clock does."""

from __future__ import annotations

import time

import pytest

from services.registry.clock import Clock

HOUR_MS = 3_600_000


class System:
    """The two clocks of a system, in milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_ms, self.monotonic_ms = 1_700_000_000_000, 5_000
        monkeypatch.setattr(time, "time_ns", lambda: self.wall_ms * 1_000_000)
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.monotonic_ms * 1_000_000)

    def pass_ms(self, milliseconds: int) -> None:
        self.wall_ms += milliseconds
        self.monotonic_ms += milliseconds


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


def test_row_136_small_steps_are_taken_as_they_come(system: System) -> None:
    clock = Clock()
    for step_ms in (59_000, -30_000, 1_000):
        system.wall_ms += step_ms
        assert clock.now_ms() == system.wall_ms
        system.pass_ms(1_000)


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS])
def test_row_136_a_jump_is_caught_up_with_slowly(
    system: System, jump_ms: int, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    before_ms = clock.now_ms()
    system.wall_ms += jump_ms
    assert clock.now_ms() == before_ms
    readings = []
    for _ in range(600):
        system.pass_ms(1_000)
        readings.append(clock.now_ms())
    assert readings == sorted(readings)
    passed_ms = readings[-1] - before_ms
    assert passed_ms == 600_000 + (60_000 if jump_ms > 0 else -60_000)
    assert caplog.messages == ["the system's clock has jumped"]
    for _ in range(36_000):
        system.pass_ms(1_000)
        clock.now_ms()
    assert clock.now_ms() == system.wall_ms
