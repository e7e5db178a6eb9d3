"""Captures decode steps as CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from services.inference.engine.graphs import Replay
from services.inference.kernels.triton_lora import TritonLora

# The first run compiles kernels and makes the libraries' workspaces, neither of which can be captured.
_WARM_RUNS = 2


class CudaCapture:
    """Captures steps, all into one pool of memory of at most `limit_bytes`.

    Adapters must be computed by `lora`, whose tables stay where they are. It is assumed of a bitsandbytes
    base that its kernels launch on the current stream and wait for nothing; what they unpack 4-bit weights to
    lies in the pool.
    """

    def __init__(self, lora: TritonLora, device: torch.device, limit_bytes: int) -> None:
        self._lora = lora
        self._device = device
        self._limit_bytes = limit_bytes
        self._pool = torch.cuda.graph_pool_handle()
        self._used_bytes = 0
        self._kept = 0

    def __call__(self, step: Replay, num_rows: int, max_rank: int) -> Replay | None:
        """See `Capture`."""
        self._lora.reserve(num_rows, max_rank)
        self._warm(step)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = step()
        self._used_bytes += torch.cuda.memory_reserved(self._device) - before
        if self._used_bytes > self._limit_bytes:
            if self._kept == 0:
                # With its only graph the pool goes; a smaller one may fit.
                self._pool, self._used_bytes = torch.cuda.graph_pool_handle(), 0
            return None
        self._kept += 1

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay

    def _warm(self, step: Replay) -> None:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_RUNS):
                step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
