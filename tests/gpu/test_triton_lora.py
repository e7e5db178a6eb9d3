"""The Triton kernels of the adapters against their plain twin, on a GPU."""

from __future__ import annotations

import pytest
import torch

from services.inference.adapters.ops import add_lora_reference
from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.weights import AdapterWeights, LoraPair

pytestmark = pytest.mark.gpu

IN = 200
WIDTHS = {"q": 192, "k": 40}


def make_adapter(rank: int, dtype: torch.dtype, *, vectors: bool) -> AdapterWeights:
    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.2).to("cuda", dtype)

    pairs = {
        name: LoraPair(
            noise(rank, IN),
            noise(width, rank),
            noise(width) if vectors else None,
            noise(width) if vectors else None,
        )
        for name, width in WIDTHS.items()
    }
    return AdapterWeights(pairs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_mixed_ranks_and_base_rows_agree_with_the_twin(dtype: torch.dtype, tolerance: float) -> None:
    triton_lora = pytest.importorskip("services.inference.kernels.triton_lora")
    torch.manual_seed(0)
    adapters = [make_adapter(rank, dtype, vectors=rank % 2 == 1) for rank in (4, 16, 5, 64)]
    rows = [AdapterRows(2 * index, 2 * index + 2, weights) for index, weights in enumerate(adapters)]
    by_row = [weights for weights in adapters for _ in range(2)]
    lora = triton_lora.TritonLora({name: row for row, name in enumerate(WIDTHS)}, torch.device("cuda"))
    lora.begin(rows, 10)
    x = torch.randn(1, 10, IN, device="cuda").to(dtype)
    for name, width in WIDTHS.items():
        y = torch.randn(1, 10, width, device="cuda").to(dtype)
        wanted = y[0].clone()
        add_lora_reference(wanted, x[0], [*by_row, None, None], name)
        lora.adapt(name, x, y)
        torch.testing.assert_close(y[0], wanted, rtol=tolerance, atol=tolerance)
