"""KV pages and adapters on one budget: each grows into what is idle, within limits, the cheapest first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.adapters.device_budget import DeviceBudget


class Pieces:
    """Idle pieces of one side, each of 10 bytes, with what each is worth."""

    def __init__(self, budget: DeviceBudget, *, is_kv: bool, worths: list[float]) -> None:
        self._give_back = budget.give_back_kv if is_kv else budget.give_back_adapters
        taken = (budget.take_kv if is_kv else budget.take_adapters)(10 * len(worths))
        assert taken
        self.worths = sorted(worths)

    def idle_bytes(self) -> int:
        return 10 * len(self.worths)

    def idle_worth(self) -> float | None:
        return self.worths[0] if self.worths else None

    def free_idle(self) -> bool:
        if not self.worths:
            return False
        del self.worths[0]
        self._give_back(10)
        return True


def test_each_side_grows_into_the_others_idle_part_and_no_further() -> None:
    budget = DeviceBudget(100, 60, own_share=0.5)
    assert not budget.take_kv(131)
    assert budget.take_kv(130)
    assert not budget.take_adapters(31)
    assert budget.take_adapters(30)
    assert not budget.take_kv(1)
    budget.give_back_kv(130)
    assert not budget.take_adapters(81)
    assert budget.take_adapters(80)
    assert (budget.kv_used_bytes, budget.adapter_used_bytes) == (0, 110)


def test_a_fixed_boundary_is_kept() -> None:
    budget = DeviceBudget(100, 60)
    assert not budget.take_kv(101)
    assert not budget.take_adapters(61)


def test_the_cheapest_idle_pieces_make_room() -> None:
    budget = DeviceBudget(50, 50, own_share=0.0)
    budget.kv = kv = Pieces(budget, is_kv=True, worths=[1.0, 4.0, 5.0, 6.0, 7.0])
    budget.adapters = adapters = Pieces(budget, is_kv=False, worths=[2.0, 3.0, 8.0, 9.0, 10.0])
    assert budget.make_room_for_adapters(35)
    assert kv.worths == [5.0, 6.0, 7.0]
    assert adapters.worths == [8.0, 9.0, 10.0]
    assert budget.take_adapters(35)


def test_nothing_is_freed_for_what_cannot_fit() -> None:
    budget = DeviceBudget(50, 50, own_share=0.0)
    assert budget.take_kv(40)
    budget.adapters = adapters = Pieces(budget, is_kv=False, worths=[1.0, 2.0])
    assert not budget.make_room_for_adapters(61)
    assert adapters.worths == [1.0, 2.0]
    assert budget.make_room_for_adapters(60)
    assert adapters.worths == []


def test_pages_are_not_freed_where_the_adapters_limit_is_what_lacks() -> None:
    budget = DeviceBudget(50, 50, own_share=1.0)
    budget.kv = kv = Pieces(budget, is_kv=True, worths=[0.1])
    budget.adapters = adapters = Pieces(budget, is_kv=False, worths=[5.0, 6.0, 7.0, 8.0, 9.0])
    assert budget.make_room_for_adapters(20)
    assert kv.worths == [0.1]
    assert adapters.worths == [7.0, 8.0, 9.0]


@given(
    kv_bytes=st.integers(0, 200),
    adapter_bytes=st.integers(0, 200),
    own_share=st.floats(0, 1),
    moves=st.lists(st.tuples(st.booleans(), st.integers(-80, 80)), max_size=40),
)
def test_no_side_passes_its_limit_and_together_they_never_pass_the_total(
    kv_bytes: int, adapter_bytes: int, own_share: float, moves: list[tuple[bool, int]]
) -> None:
    budget = DeviceBudget(kv_bytes, adapter_bytes, own_share=own_share)
    for is_kv, size in moves:
        used = budget.kv_used_bytes if is_kv else budget.adapter_used_bytes
        if size < 0 and used + size >= 0:
            (budget.give_back_kv if is_kv else budget.give_back_adapters)(-size)
        elif size >= 0:
            room = budget.kv_room_bytes if is_kv else budget.adapter_room_bytes
            assert (budget.take_kv if is_kv else budget.take_adapters)(size) == (size <= room)
        assert budget.kv_used_bytes + budget.adapter_used_bytes <= budget.total_bytes
        assert budget.kv_used_bytes <= budget.most_kv_bytes
        assert budget.adapter_used_bytes <= budget.most_adapter_bytes
