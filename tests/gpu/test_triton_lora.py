"""The Triton kernels of the adapters against their plain twin, on a GPU."""

from __future__ import annotations

import pytest
import torch

from services.inference.adapters.ops import add_lora_reference
from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.weights import AdapterWeights, LoraPair

pytestmark = pytest.mark.gpu

WIDTHS = {"q": 192, "k": 40}


def make_adapter(rank: int, width: int, dtype: torch.dtype, *, vectors: bool) -> AdapterWeights:
    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.2).to("cuda", dtype)

    pairs = {
        name: LoraPair(
            noise(rank, width),
            noise(rank, out).T,
            noise(out) if vectors else None,
            noise(out) if vectors else None,
        )
        for name, out in WIDTHS.items()
    }
    return AdapterWeights(pairs)


# The widths are and are not divisible by what the kernels read at once.
@pytest.mark.parametrize("width", [200, 256, 331])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_mixed_ranks_and_base_rows_agree_with_the_twin(
    dtype: torch.dtype, tolerance: float, width: int
) -> None:
    triton_lora = pytest.importorskip("services.inference.kernels.triton_lora")
    torch.manual_seed(0)
    adapters = [make_adapter(rank, width, dtype, vectors=rank % 2 == 1) for rank in (4, 16, 5, 64, 1)]
    rows = [AdapterRows(2 * index, 2 * index + 2, weights) for index, weights in enumerate(adapters)]
    by_row = [weights for weights in adapters for _ in range(2)]
    lora = triton_lora.TritonLora(
        {name: row for row, name in enumerate(WIDTHS)}, torch.device("cuda"), max_rows=16, max_adapters=8
    )
    lora.begin(rows, 12)
    x = torch.randn(1, 12, width, device="cuda").to(dtype)
    for name, out in WIDTHS.items():
        y = torch.randn(1, 12, out, device="cuda").to(dtype)
        wanted = y[0].clone()
        add_lora_reference(wanted, x[0], [*by_row, None, None], name)
        lora.adapt(name, x, y)
        torch.testing.assert_close(y[0], wanted, rtol=tolerance, atol=tolerance)
