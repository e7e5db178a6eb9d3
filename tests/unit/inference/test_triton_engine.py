"""The engine with Triton's kernels, in Triton's interpreter, gives the tokens of the torch forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.inference.config import EngineConfig
from services.inference.engine.engine import Engine
from tests.support.architectures import write_tiny_model
from tests.support.engines import FolderFetcher, make_engine, request, run_all, tokens_of
from tests.support.models import ALL_LINEAR_TARGETS, make_peft_adapter
from tests.support.triton_mode import in_the_interpreter

MAX_TOKENS = 4


def serve(engine: Engine, names: list[str | None]) -> dict[str, list[int]]:
    for number, name in enumerate(names):
        prompt = [6 + (7 * number + 3 * at) % 250 for at in range(3 + 6 * number)]
        engine.add(request(str(number), prompt, name, max_tokens=MAX_TOKENS, ignore_eos=True))
    tokens = {name: tokens_of(events) for name, events in run_all(engine, timeout_seconds=280).items()}
    engine.adapters.close()
    return tokens


@in_the_interpreter
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16}),
    ],
)
@pytest.mark.parametrize("decode_graphs", ["off", "eager"])
def test_triton_and_torch_choose_the_same_tokens(
    model_type: str, settings: dict[str, Any], decode_graphs: str, tmp_path: Path
) -> None:
    from services.inference.kernels.triton_attention import TritonAttention

    base = write_tiny_model(tmp_path / "base", model_type, **settings)
    adapters = {
        f"a{rank}": make_peft_adapter(
            base, tmp_path / f"a{rank}", r=rank, targets=ALL_LINEAR_TARGETS, seed=rank, use_dora=rank == 4
        )
        for rank in (4, 7)
    }
    names = [None, "a4", "a7"]
    make = {"max_num_seqs": 4, "max_model_len": 64}
    plain = make_engine(base, tmp_path / "torch", FolderFetcher(adapters), kernels="torch", **make)
    triton = make_engine(
        base,
        tmp_path / "triton",
        FolderFetcher(adapters),
        kernels="triton",
        decode_graphs=decode_graphs,
        **make,
    )
    assert isinstance(triton._base.attention, TritonAttention)
    assert serve(triton, names) == serve(plain, names)


def test_triton_on_a_cpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValidationError, match=r"kernels is triton, which (is not installed|needs a GPU)"):
        EngineConfig(base_path=tmp_path, adapter_cache_path=tmp_path, device="cpu", kernels="triton")
