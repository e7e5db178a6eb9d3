"""The block pool never loses a block and never gives one out twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.inference.engine.blocks import BlockPool

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["grow", "free"]), st.integers(0, 4), st.integers(1, 40)), max_size=60
)


@given(num_blocks=st.integers(1, 24), block_size=st.integers(1, 8), actions=ACTIONS)
def test_every_block_has_one_holder(
    num_blocks: int, block_size: int, actions: list[tuple[str, int, int]]
) -> None:
    pool = BlockPool(num_blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(5)]
    for action, holder, tokens in actions:
        table = tables[holder]
        if action == "free":
            pool.free(table)
            assert table == []
        elif pool.can_grow(table, tokens):
            before = list(table)
            pool.grow(table, tokens)
            assert table[: len(before)] == before
            assert len(table) == max(len(before), -(-tokens // block_size))
        else:
            assert -(-tokens // block_size) - len(table) > pool.num_free
        held = [block for one in tables for block in one]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_blocks))
        assert len(held) + pool.num_free == num_blocks
    for table in tables:
        pool.free(table)
    assert pool.num_free == num_blocks
