"""A block is free, live or idle; nothing is lost, overwritten while used, or found by mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.adapters.device_budget import DeviceBudget
from services.inference.engine.blocks import BlockPool
from services.inference.engine.prefix import Chain
from tests.support.engines import PlainPages

SIZE = 4
ACME: tuple[str, str | None] = ("acme", "sha256:1")


def pool_of(num_blocks: int, *, extent_blocks: int = 0, **options: object) -> BlockPool:
    memory = PlainPages(num_blocks, extent_blocks or num_blocks)
    return BlockPool(memory, SIZE, DeviceBudget(num_blocks, 0), **options)  # type: ignore[arg-type]


class Table:
    """A block table whose tokens have all been computed."""

    def __init__(self, pool: BlockPool, tokens: list[int], scope: tuple[str, str | None] = ACME) -> None:
        self.pool = pool
        self.tokens = tokens
        self.blocks: list[int] = []
        self.chain = Chain.at_root(scope)
        self.num_found = pool.attach(self.blocks, self.chain, tokens)
        assert pool.grow(self.blocks, len(tokens))
        pool.register(self.blocks, self.chain, tokens, len(tokens))

    def free(self) -> None:
        self.pool.free(self.blocks)


def numbers(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def test_full_blocks_are_found_again_and_one_token_is_left_to_compute() -> None:
    pool = pool_of(16)
    first = Table(pool, numbers(10))
    shared = list(first.blocks)
    assert first.num_found == 0
    second = Table(pool, numbers(9))
    assert second.num_found == 8
    assert second.blocks[:2] == shared[:2]
    assert second.blocks[2] not in shared
    assert Table(pool, numbers(8)).num_found == 4
    assert Table(pool, [*numbers(4), 99, *numbers(5)]).num_found == 4
    assert Table(pool, [99, *numbers(9)]).num_found == 0


def test_idle_blocks_are_found_until_their_place_is_needed() -> None:
    pool = pool_of(4)
    Table(pool, numbers(9)).free()
    assert (pool.num_free, pool.num_idle, pool.num_live) == (2, 2, 0)
    again = Table(pool, numbers(9))
    assert again.num_found == 8
    again.free()
    Table(pool, numbers(12, start=50)).free()
    # Its end went, its beginning did not.
    assert pool.count_known(Chain.at_root(ACME), numbers(9)) == 4


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = pool_of(4)
    Table(pool, numbers(5)).free()
    Table(pool, numbers(5, start=20)).free()
    Table(pool, numbers(5)).free()
    other = Table(pool, numbers(9, start=40))
    assert pool.count_known(Chain.at_root(ACME), numbers(5)) == 4
    assert pool.count_known(Chain.at_root(ACME), numbers(5, start=20)) == 0
    other.free()


@pytest.mark.parametrize(
    "scope", [("acme", "sha256:2"), ("other", "sha256:1"), ("acme", None), ("other", None)]
)
def test_nothing_is_found_across_tenants_or_versions(scope: tuple[str, str | None]) -> None:
    pool = pool_of(16)
    Table(pool, numbers(9)).free()
    assert Table(pool, numbers(9), scope).num_found == 0
    assert Table(pool, numbers(9)).num_found == 8


def test_what_hangs_from_a_forgotten_block_is_not_found() -> None:
    pool = pool_of(6)
    mine, yours = Table(pool, numbers(5)), Table(pool, [])
    # The same tokens computed twice at once: the second copy stays unknown, what follows it is known.
    assert pool.grow(yours.blocks, 9)
    pool.register(yours.blocks, yours.chain, numbers(9), 9)
    assert mine.blocks[0] != yours.blocks[0]
    assert pool.count_known(Chain.at_root(ACME), numbers(9)) == 8
    mine.free()
    filler = Table(pool, numbers(9, start=100))
    assert pool.count_known(Chain.at_root(ACME), numbers(9)) == 0
    yours.free()
    filler.free()
    assert pool.num_free + pool.num_idle == 6


def test_without_the_cache_nothing_is_kept() -> None:
    pool = pool_of(8, is_caching=False)
    Table(pool, numbers(9)).free()
    assert (pool.num_free, pool.num_idle) == (8, 0)
    assert Table(pool, numbers(9)).num_found == 0


def test_growing_is_all_or_nothing() -> None:
    pool = pool_of(4)
    table: list[int] = []
    assert pool.grow(table, 8)
    other: list[int] = []
    assert not pool.can_grow(other, 12)
    assert not pool.grow(other, 12)
    assert other == []
    assert pool.num_free == 2
    assert pool.can_grow(other, 8)


class IdleAdapters:
    """Idle adapters of 4 bytes each, all worth the same."""

    def __init__(self, budget: DeviceBudget, count: int, worth: float) -> None:
        assert budget.take_adapters(4 * count)
        self._budget = budget
        self.count = count
        self.worth = worth

    def idle_bytes(self) -> int:
        return 4 * self.count

    def idle_worth(self) -> float | None:
        return self.worth if self.count else None

    def free_idle(self) -> bool:
        if self.count:
            self.count -= 1
            self._budget.give_back_adapters(4)
            return True
        return False


@pytest.mark.parametrize(("worth", "adapters_left", "prefix_left"), [(1e-9, 1, 8), (1e9, 2, 4)])
def test_pages_grow_at_the_cost_of_what_is_cheaper(
    worth: float, adapters_left: int, prefix_left: int
) -> None:
    now = [0.0]
    budget = DeviceBudget(4, 8, own_share=0.0)
    memory = PlainPages(12, extent_blocks=4)
    pool = BlockPool(memory, SIZE, budget, clock=lambda: now[0])
    pool.seconds_per_token = 1e-3
    Table(pool, numbers(9)).free()
    busy = Table(pool, numbers(8, start=50))
    budget.adapters = adapters = IdleAdapters(budget, 2, worth)
    now[0] = 1.0
    more = Table(pool, numbers(4, start=70))
    assert adapters.count == adapters_left
    assert pool.count_known(Chain.at_root(ACME), numbers(9)) == prefix_left
    assert budget.kv_used_bytes + budget.adapter_used_bytes <= budget.total_bytes
    more.free()
    busy.free()


def test_idle_pages_give_way_to_adapters_and_their_memory_is_released() -> None:
    budget = DeviceBudget(8, 4, own_share=0.0)
    memory = PlainPages(12, extent_blocks=2)
    pool = BlockPool(memory, SIZE, budget)
    old, live = Table(pool, numbers(8)), Table(pool, numbers(8, start=50))
    new = Table(pool, numbers(8, start=90))
    old.free()
    new.free()
    assert budget.kv_used_bytes == 6
    assert not budget.make_room_for_adapters(11)
    assert budget.make_room_for_adapters(8)
    assert memory.released == [0]
    assert pool.count_known(Chain.at_root(ACME), numbers(9)) == 0
    assert pool.count_known(Chain.at_root(ACME), numbers(9, start=90)) == 8
    assert budget.take_adapters(8)
    assert pool.can_grow([], 4 * 2)
    assert not pool.can_grow([], 4 * 3)
    live.free()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "grow", "free", "adapter", "drop"]), st.integers(0, 4), st.integers(1, 30)
    ),
    max_size=60,
)


@given(
    num_blocks=st.integers(1, 24),
    extent_blocks=st.integers(1, 8),
    own_share=st.sampled_from([0.0, 0.5, 1.0]),
    is_caching=st.booleans(),
    actions=ACTIONS,
)
def test_every_block_is_free_idle_or_live(
    num_blocks: int,
    extent_blocks: int,
    own_share: float,
    is_caching: bool,
    actions: list[tuple[str, int, int]],
) -> None:
    budget = DeviceBudget(num_blocks, 10, own_share=own_share)
    memory = PlainPages(budget.most_kv_bytes, extent_blocks)
    pool = BlockPool(memory, 2, budget, is_caching=is_caching)
    tables: list[list[int]] = [[] for _ in range(5)]
    chains = [Chain.at_root(("t", None)) for _ in range(5)]
    texts: list[list[int]] = [[] for _ in range(5)]
    adapter_bytes = 0
    for action, holder, size in actions:
        table, chain = tables[holder], chains[holder]
        if action == "free":
            pool.free(table)
        elif action == "adapter":
            if budget.make_room_for_adapters(size):
                assert budget.take_adapters(size)
                adapter_bytes += size
        elif action == "drop":
            budget.give_back_adapters(adapter_bytes)
            adapter_bytes = 0
        elif action == "admit":
            pool.free(table)
            # Few different texts, so that prefixes are found.
            texts[holder] = [size % 3] * size
            found = pool.attach(table, chain, texts[holder])
            assert found < size
            assert found == len(table) * 2
            if pool.can_grow(table, size) and pool.grow(table, size):
                pool.register(table, chain, texts[holder], size)
            else:
                pool.free(table)
        elif table:
            before = list(table)
            texts[holder] = texts[holder] + [size] * size
            if pool.grow(table, len(texts[holder])):
                assert table[: len(before)] == before
                pool.register(table, chain, texts[holder], len(texts[holder]))
            else:
                texts[holder] = texts[holder][:-size]
                assert table == before
        held = Counter(block for one in tables for block in one)
        assert pool.num_live == len(held)
        assert pool.num_free + pool.num_idle + pool.num_live == memory.num_blocks
        assert budget.kv_used_bytes + budget.adapter_used_bytes <= budget.total_bytes
        for block in (block for block, count in held.items() if count > 1):
            # Shared blocks are full in every table that has them, and hold the same tokens there.
            contents = {
                tuple(text[: 2 * (one.index(block) + 1)])
                for one, text in zip(tables, texts, strict=True)
                if block in one
            }
            assert len(contents) == 1
            assert len(contents.pop()) % 2 == 0
    for table in tables:
        pool.free(table)
    assert pool.num_live == 0
    assert pool.num_free + pool.num_idle == memory.num_blocks


def test_worth_falls_with_age() -> None:
    now = [0.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    pool = BlockPool(PlainPages(4, 2), SIZE, DeviceBudget(4, 0), clock=clock)
    pool.seconds_per_token = 0.5
    Table(pool, numbers(8)).free()
    now[0] = 2.0
    # Four tokens of half a second, asked for once in two seconds, for one byte.
    assert pool.idle_worth() == pytest.approx(1.0)
    now[0] = 4.0
    assert pool.idle_worth() == pytest.approx(0.5)
