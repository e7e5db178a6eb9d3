"""The batched deltas against their plain twin, row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.inference.adapters.ops import AdapterGroup, add_lora, add_lora_reference
from services.inference.adapters.slots import StackCache
from services.inference.adapters.weights import AdapterWeights, LoraPair

IN, OUT, MODULE = 24, 40, "layer"


def weights(rank: int, seed: int, module: str = MODULE, kind: str = "lora") -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN, generator=generator)
    b = torch.randn(OUT, rank, generator=generator)
    gain = torch.randn(OUT, generator=generator) if "scale" in kind else None
    shift = torch.randn(OUT, generator=generator) if "bias" in kind else None
    return AdapterWeights({module: LoraPair(a, b, gain, shift)})


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 8, 13]),
            st.integers(1, 5),
            st.integers(1, 4),
            st.booleans(),
            st.sampled_from(["lora", "lora+bias", "lora+scale", "lora+scale+bias"]),
        ),
        max_size=5,
    ),
    gap=st.integers(0, 3),
)
def test_groups_of_mixed_ranks_and_kinds_equal_the_plain_twin(
    parts: list[tuple[int, int, int, bool, str]], gap: int
) -> None:
    """Each part is (rank, adapters, rows of each, whether the adapters touch this module, their kind)."""
    stacks = StackCache(1 << 30)
    stacks.begin_step()
    groups: list[AdapterGroup] = []
    owners: list[AdapterWeights | None] = [None] * gap
    for number, (rank, count, rows, touches, kind) in enumerate(parts):
        module = MODULE if touches else "other"
        members = [weights(rank, 10 * number + i, module, kind) for i in range(count)]
        start = len(owners)
        owners += [member for member in members for _ in range(rows)]
        stack = stacks.stack([f"{number}.{i}" for i in range(count)], members)
        assert stack is not None
        groups.append(AdapterGroup(start, len(owners), stack))
    owners += [None] * gap
    x = torch.randn(len(owners), IN)
    y = torch.randn(len(owners), OUT)
    expected = y.clone()
    add_lora_reference(expected, x, owners, MODULE)
    add_lora(y, x, groups, MODULE)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


def test_a_stack_is_made_once_while_it_is_used_and_dropped_when_it_is_not() -> None:
    members = [weights(4, seed) for seed in range(3)]
    size_bytes = sum(member.size_bytes for member in members)
    stacks = StackCache(size_bytes)
    stacks.begin_step()
    first = stacks.stack(["a", "b", "c"], members)
    stacks.begin_step()
    assert stacks.stack(["a", "b", "c"], members) is first
    assert stacks.used_bytes == size_bytes
    stacks.begin_step()
    assert stacks.used_bytes == size_bytes
    stacks.begin_step()
    assert stacks.used_bytes == 0


def test_stacks_keep_within_their_budget_and_one_adapter_needs_none() -> None:
    members = [weights(4, seed) for seed in range(2)]
    stacks = StackCache(members[0].size_bytes)
    stacks.begin_step()
    assert stacks.stack(["a", "b"], members) is None
    single = stacks.stack(["a"], members[:1])
    assert single is not None
    assert single.pairs[MODULE][0].data_ptr() == members[0].pairs[MODULE].a.data_ptr()
    assert stacks.used_bytes == 0
