"""Places in the queue: never more than there are, and always one left for whoever is new."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.queue_share import QueueShare


def fill(queue: QueueShare, tenant: str) -> int:
    """Take places until no more are given; return how many it holds."""
    while queue.take(tenant):
        pass
    return queue.held_by(tenant)


@pytest.mark.parametrize(("share", "held"), [(1.0, 100), (0.5, 50), (0.8, 80), (0.001, 1)])
def test_one_tenant_stops_at_its_share(share: float, held: int) -> None:
    assert fill(QueueShare(100, share), "flood") == held


def test_floods_together_leave_room_for_the_quiet() -> None:
    queue = QueueShare(100, 0.5)
    for tenant in ("a", "b", "c") * 20:
        queue.take(tenant)
    held = [fill(queue, tenant) for tenant in ("a", "b", "c")]
    assert sum(held) < 100
    for number in range(100 - sum(held)):
        assert queue.take(f"quiet-{number}")
    assert not queue.take("one more")
    queue.give_back("a")
    assert queue.take("one more")


@given(
    limit=st.integers(1, 30),
    share=st.floats(0.01, 1.0),
    moves=st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")), max_size=80),
)
def test_places_are_counted_and_newcomers_get_a_free_one(
    limit: int, share: float, moves: list[tuple[bool, str]]
) -> None:
    queue = QueueShare(limit, share)
    held: dict[str, int] = {}
    for is_taking, tenant in moves:
        if is_taking:
            is_new, has_room = not held.get(tenant), sum(held.values()) < limit
            if queue.take(tenant):
                held[tenant] = held.get(tenant, 0) + 1
            else:
                assert not (is_new and has_room)
        elif held.get(tenant):
            queue.give_back(tenant)
            held[tenant] -= 1
        assert queue.held == sum(held.values()) <= limit
