"""The Triton kernel of decode attention against its torch twin, in Triton's interpreter.

The interpreter multiplies no bfloat16 matrices; float16 takes the same way through the kernel.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from services.inference.model.attention import DecodeGroup, _decode
from services.inference.model.kv import KvShape, PagedKv
from services.inference.model.plain_attention import ScoreChanges
from tests.support.triton_mode import in_the_interpreter

pytestmark = in_the_interpreter

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Case:
    lengths: tuple[int, ...] = (1, 9, 40)
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 4
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    dtype: torch.dtype = torch.float32


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    return Case(
        lengths=tuple(draw.randrange(1, 200) for _ in range(draw.randrange(1, 5))),
        group=draw.choice((1, 3, 4, 8)),
        kv_heads=draw.choice((1, 2)),
        head_dim=draw.choice((16, 64, 80, 96, 128)),
        block_size=draw.choice((1, 4, 5, 16, 32)),
        window=draw.choice((None, None, 3, 70)),
        softcap=draw.choice((None, None, 3.0)),
        has_sinks=draw.random() < 0.3,
        dtype=draw.choice((torch.float32, torch.float16)),
    )


CASES = {
    "one token": Case(lengths=(1,)),
    "one query head to a KV head": Case(group=1),
    "eight query heads to a KV head": Case(group=8, kv_heads=1),
    "heads of 96": Case(head_dim=96),
    "heads of 128": Case(head_dim=128, dtype=torch.float16),
    "heads of 256": Case(head_dim=256, kv_heads=1),
    "window smaller than a block": Case(window=2, block_size=16),
    "window of one": Case(window=1),
    "window longer than all": Case(window=500),
    "soft cap": Case(softcap=2.0),
    "sinks": Case(has_sinks=True),
    "all at once": Case(window=5, softcap=2.0, has_sinks=True, dtype=torch.float16),
    "many parts": Case(lengths=(300, 64, 65, 1), group=2),
    **{f"drawn {seed}": drawn(seed) for seed in range(8)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@torch.inference_mode()
def test_the_kernel_agrees_with_its_twin(case: Case) -> None:
    from services.inference.kernels.triton_attention import TritonAttention

    torch.manual_seed(0)
    n, heads = len(case.lengths), case.group * case.kv_heads
    width = max(-(-length // case.block_size) for length in case.lengths)
    kv = PagedKv(KvShape(1, case.kv_heads, case.head_dim, case.block_size, case.dtype), width * n, CPU)
    for pages in (kv.keys[0], kv.values[0]):
        pages.copy_(torch.randn(pages.shape))
    # Rows of other sequences lie between; the heads come as a transposed view.
    queries = torch.randn(heads, n + 2, case.head_dim).to(case.dtype).transpose(0, 1)
    rows = torch.randperm(n + 2)[:n]
    lengths = torch.tensor(case.lengths)
    tables = torch.randperm(width * n).view(n, width)
    changes = ScoreChanges(case.softcap, torch.randn(heads).to(case.dtype) if case.has_sinks else None)
    group = DecodeGroup(rows, tables, lengths, max(case.lengths))
    wanted = _decode(kv, 0, group, queries[rows], 0.3, case.window, changes)
    # A page that is not the sequence's own must not matter, whatever is in it.
    for sequence, length in enumerate(case.lengths):
        used = -(-length // case.block_size)
        kv.keys[0][tables[sequence, used:]] = torch.nan
        kv.values[0][tables[sequence, used:]] = torch.nan

    output = torch.full((n + 2, heads, case.head_dim), torch.nan, dtype=case.dtype)
    attention = TritonAttention()
    assert attention.serves(queries, kv.keys[0], changes)
    attention.attend(
        output,
        queries,
        (kv.keys[0], kv.values[0]),
        rows,
        tables,
        lengths,
        max_length=max(case.lengths),
        scaling=0.3,
        window=case.window,
        changes=changes,
    )
    tolerance = 1e-5 if case.dtype is torch.float32 else 5e-3
    torch.testing.assert_close(output[rows], wanted, rtol=tolerance, atol=tolerance)
    others = sorted(set(range(n + 2)) - set(rows.tolist()))
    assert output[others].isnan().all()


def test_longer_tables_than_any_sequence_needs_change_nothing() -> None:
    from services.inference.kernels.triton_attention import TritonAttention

    torch.manual_seed(0)
    kv = PagedKv(KvShape(1, 2, 16, 4, torch.float32), 8, CPU)
    for pages in (kv.keys[0], kv.values[0]):
        pages.copy_(torch.randn(pages.shape))
    queries = torch.randn(2, 4, 16)
    rows, lengths = torch.arange(2), torch.tensor([3, 9])
    narrow = torch.tensor([[0, 7, 7], [2, 3, 4]])
    wide = torch.cat((narrow, torch.full((2, 60), 8)), dim=1)
    outputs = []
    for tables, max_length in ((narrow, 9), (wide, 63 * 4)):
        output = torch.empty(2, 4, 16)
        TritonAttention().attend(
            output,
            queries,
            (kv.keys[0], kv.values[0]),
            rows,
            tables,
            lengths,
            max_length=max_length,
            scaling=0.25,
            window=None,
            changes=ScoreChanges(),
        )
        outputs.append(output)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_other_types_are_left_to_the_torch_form() -> None:
    from services.inference.kernels.triton_attention import TritonAttention

    attention, none = TritonAttention(), ScoreChanges()
    keys = torch.zeros(1, 4, 1, 16)
    queries = torch.zeros(1, 2, 16)
    assert attention.serves(queries, keys, none)
    assert not attention.serves(queries.double(), keys.double(), none)
    assert not attention.serves(queries.half(), keys, none)
    assert not attention.serves(torch.zeros(1, 2, 512), torch.zeros(1, 4, 1, 512), none)
