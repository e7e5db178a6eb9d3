"""The Triton kernel of decode attention against its torch twin, on a GPU."""

from __future__ import annotations

import pytest
import torch

from services.inference.model.attention import DecodeGroup, _decode
from services.inference.model.kv import KvShape, PagedKv
from services.inference.model.plain_attention import ScoreChanges

pytestmark = pytest.mark.gpu

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 8, 16), (4, 8, 64), (8, 1, 80), (4, 2, 96), (4, 8, 128), (2, 4, 256)]
LENGTHS = {"short": (1, 3, 17), "long": (4000, 1, 129, 640), "one": (2048,), "many": tuple(range(1, 65))}


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("group", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(("window", "changed"), [(None, False), (5, False), (100, True), (None, True)])
@torch.inference_mode()
def test_the_kernel_agrees_with_its_twin(
    dtype: torch.dtype,
    group: int,
    kv_heads: int,
    head_dim: int,
    lengths: tuple[int, ...],
    window: int | None,
    changed: bool,
) -> None:
    triton_attention = pytest.importorskip("services.inference.kernels.triton_attention")
    torch.manual_seed(0)
    device = torch.device("cuda")
    n, heads, width = len(lengths), group * kv_heads, -(-max(lengths) // 16)
    kv = PagedKv(KvShape(1, kv_heads, head_dim, 16, dtype), width * n, device)
    for pages in (kv.keys[0], kv.values[0]):
        pages.normal_()
    queries = torch.randn(heads, n, head_dim, device=device).to(dtype).transpose(0, 1)
    rows = torch.randperm(n, device=device)
    tables = torch.randperm(width * n, device=device).view(n, width)
    changes = ScoreChanges(5.0, torch.randn(heads, device=device).to(dtype)) if changed else ScoreChanges()
    decodes = DecodeGroup(rows, tables, torch.tensor(lengths, device=device), max(lengths))
    # The twin in float32: its own roundings are not the kernel's.
    exact = PagedKv(KvShape(1, kv_heads, head_dim, 16, torch.float32), width * n, device)
    exact.keys[0].copy_(kv.keys[0])
    exact.values[0].copy_(kv.values[0])
    wanted = _decode(exact, 0, decodes, queries[rows].float(), 0.1, window, changes)
    output = torch.full((n, heads, head_dim), torch.nan, dtype=dtype, device=device)
    triton_attention.TritonAttention().attend(
        output,
        queries,
        (kv.keys[0], kv.values[0]),
        rows,
        tables,
        decodes.lengths,
        max_length=max(lengths),
        scaling=0.1,
        window=window,
        changes=changes,
    )
    torch.testing.assert_close(output[rows].float(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
