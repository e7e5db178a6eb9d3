"""The Triton kernels of the adapters against their plain twin, in Triton's interpreter."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from torch import Tensor

from services.inference.adapters.ops import add_lora_reference
from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.weights import AdapterWeights, LoraPair
from tests.support.triton_mode import in_the_interpreter

pytestmark = in_the_interpreter

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def make_adapter(rank: int, width: int, outs: dict[str, int], dtype: torch.dtype) -> AdapterWeights:
    """Return an adapter whose odd ranks have gains and shifts, and stored as the reader stores them."""

    def noise(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.2).to(dtype)

    pairs = {
        name: LoraPair(
            noise(rank, width),
            noise(rank, out).T,
            noise(out) if rank % 2 else None,
            noise(out) if rank % 2 else None,
        )
        for name, out in outs.items()
    }
    return AdapterWeights(pairs)


@pytest.mark.parametrize("seed", range(6))
def test_mixed_ranks_and_base_rows_agree_with_the_twin(seed: int) -> None:
    from services.inference.kernels.triton_lora import TritonLora

    torch.manual_seed(seed)
    draw = random.Random(seed)
    dtype = draw.choice(list(TOLERANCES))
    width = draw.choice((16, 33, 200, 300))
    outs = {"q": draw.choice((8, 130, 192)), "k": 40}
    lora = TritonLora({"q": 0, "k": 1, "v": 2}, CPU, max_rows=40, max_adapters=6)
    for _ in range(3):
        rows: list[AdapterRows] = []
        by_row: list[AdapterWeights | None] = []
        for rank in draw.sample((1, 4, 5, 16, 17, 64), 4):
            # Rows of the base may come anywhere; one adapter may leave a layer alone.
            names = dict(outs) if draw.random() < 0.8 else {"q": outs["q"]}
            weights = make_adapter(rank, width, names, dtype)
            start, length = len(by_row), draw.choice((1, 1, 2, 3))
            rows.append(AdapterRows(start, start + length, weights))
            by_row += [weights] * length + [None] * draw.choice((0, 0, 2))
        lora.begin(rows, len(by_row))
        x = torch.randn(1, len(by_row), width).to(dtype)
        for name, out in outs.items():
            y = torch.randn(1, len(by_row), out).to(dtype)
            wanted = y[0].clone()
            add_lora_reference(wanted, x[0], by_row, name)
            lora.adapt(name, x, y)
            tolerance = TOLERANCES[dtype]
            torch.testing.assert_close(y[0], wanted, rtol=tolerance, atol=tolerance)
        lora.end()


def test_launches_that_were_reserved_serve_any_adapters_of_later_steps() -> None:
    """As a captured graph does: what was launched for the reserved ranks runs on the tables of the step."""
    from services.inference.kernels.triton_lora import TritonLora

    torch.manual_seed(0)
    lora = TritonLora({"q": 0}, CPU, max_rows=8, max_adapters=4)
    tables, row_tables = lora._tables.data_ptr(), lora._row_tables.data_ptr()
    lora.reserve(4, 64)
    assert lora.has_adapters
    x, y = torch.randn(4, 24), torch.randn(4, 30)
    untouched = y.clone()
    lora.adapt("q", x, y)
    assert torch.equal(y, untouched)
    for ranks in ((4, 64), (16, 1), (16, 1)):
        first, second = (make_adapter(rank, 24, {"q": 30}, torch.float32) for rank in ranks)
        lora.begin([AdapterRows(0, 1, first), AdapterRows(2, 3, second)], 4)
        lora._max_rank = 64
        got, wanted = untouched.clone(), untouched.clone()
        add_lora_reference(wanted, x, [first, None, second, None], "q")
        lora.adapt("q", x, got)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (tables, row_tables) == (lora._tables.data_ptr(), lora._row_tables.data_ptr())
    lora.begin((), 4)
    assert not lora.has_adapters


def test_the_same_adapters_are_found_again_and_others_are_forgotten() -> None:
    from services.inference.kernels.triton_lora import TritonLora

    torch.manual_seed(0)
    lora = TritonLora({"q": 0}, CPU, max_rows=8, max_adapters=4)
    one, two = (make_adapter(4, 16, {"q": 8}, torch.float32) for _ in range(2))
    x = torch.randn(2, 16)
    for adapters in ((one, two), (two, one), (one, one), (two, None), (one, two)):
        rows = [AdapterRows(at, at + 1, item) for at, item in enumerate(adapters) if item is not None]
        lora.begin(rows, 2)
        got, wanted = torch.zeros(2, 8), torch.zeros(2, 8)
        add_lora_reference(wanted, x, adapters, "q")
        lora.adapt("q", x, got)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        lora.end()


def test_weights_at_an_odd_address_are_moved() -> None:
    from services.inference.kernels.triton_lora import TritonLora

    torch.manual_seed(0)
    a = torch.randn(4 * 16 + 1)[1:].view(4, 16)
    assert a.data_ptr() % 16
    weights = AdapterWeights({"q": LoraPair(a, torch.randn(4, 8).T)})
    lora = TritonLora({"q": 0}, CPU, max_rows=1, max_adapters=1)
    lora.begin([AdapterRows(0, 1, weights)], 1)
    assert not int(lora._tables[0, 0, 0]) % 16
    x, got, wanted = torch.randn(1, 16), torch.zeros(1, 8), torch.zeros(1, 8)
    add_lora_reference(wanted, x, [weights], "q")
    lora.adapt("q", x, got)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_nobody_else_holds_is_freed_at_once() -> None:
    from services.inference.kernels.triton_lora import TritonLora

    lora = TritonLora({"q": 0}, CPU, max_rows=1, max_adapters=1)
    weights = make_adapter(4, 16, {"q": 8}, torch.float32)
    gone = weakref.ref(weights)
    lora.begin([AdapterRows(0, 1, weights)], 1)
    lora.end()
    del weights
    gc.collect()
    assert gone() is None
