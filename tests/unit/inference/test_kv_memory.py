"""The KV cache's memory comes with its use and goes with its release."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.inference.model.kv import KvShape, PagedKv

MIB = 1 << 20


def resident_bytes() -> int:
    """Return the memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_comes_with_writing_and_goes_with_release(dtype: torch.dtype) -> None:
    shape = KvShape(layers=4, kv_heads=4, head_dim=64, block_size=16, dtype=dtype)
    num_blocks = 512 * MIB // shape.block_bytes
    start = resident_bytes()
    kv = PagedKv(shape, num_blocks, torch.device("cpu"))
    assert resident_bytes() - start < 32 * MIB
    used = 64 * MIB // shape.block_bytes // kv.extent_blocks * kv.extent_blocks
    ones = torch.ones(used * 16, 4, 64, dtype=dtype)
    slots = torch.arange(used * 16)
    with_input = resident_bytes()
    for layer in range(4):
        kv.write(layer, slots, ones, ones)
    assert 48 * MIB < resident_bytes() - with_input < 96 * MIB
    for extent in range(used // kv.extent_blocks):
        kv.release(extent)
    assert resident_bytes() - with_input < 16 * MIB
    keys, values = kv.read(3, torch.tensor([[0, used - 1]]))
    assert not keys.any()
    assert not values.any()


def test_release_leaves_the_neighbours_alone() -> None:
    # 80 bytes a token and head: no power of two, so the edges of blocks and of pages meet rarely.
    shape = KvShape(layers=2, kv_heads=1, head_dim=20, block_size=4, dtype=torch.float32)
    probe = PagedKv(shape, 1, torch.device("cpu"))
    kv = PagedKv(shape, 3 * probe.extent_blocks - 5, torch.device("cpu"))
    slots = torch.arange(kv.num_blocks * 4)
    for layer in range(2):
        kv.write(layer, slots, torch.ones(len(slots), 1, 20), torch.ones(len(slots), 1, 20))
    kv.release(1)
    tables = torch.arange(kv.num_blocks)[None]
    expected = torch.ones(kv.num_blocks, 4)
    expected[kv.extent_blocks : 2 * kv.extent_blocks] = 0
    for layer in range(2):
        for pages in kv.read(layer, tables):
            assert torch.equal(pages[0, :, 0, 0], expected.flatten())
    kv.release(2)
    assert not kv.keys[0][2 * kv.extent_blocks :].any()
