"""Row 36 and alias moves: racing writers, a few rounds on either store; `bench.registry_races` runs 200."""

from __future__ import annotations

from bench.registry_races import race
from tests.support.registry import Place
from tests.support.registry_fixtures import place, s3_server

__all__ = ["place", "s3_server"]


async def test_row_36_racing_publishers_and_alias_moves(place: Place) -> None:
    outcome = await race(place, racers=16, rounds=3)
    assert outcome.published == 48
    assert (outcome.lost_or_double_versions, outcome.steps_without_one_winner) == (0, 0)
