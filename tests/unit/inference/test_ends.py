"""The ends of the model: the output head and the input embedding, each row with its own adapter's change."""

from __future__ import annotations

from pathlib import Path

import torch

from services.common.errors import LorafleetError
from services.inference.adapters.ends import EmbeddingRows, HeadRows, add_embedding, apply_head
from services.inference.adapters.weights import EmbeddingDelta, HeadDelta, LoraPair
from tests.support.architectures import ARCHITECTURES, write_tiny_model
from tests.support.engines import FolderFetcher, make_engine, request
from tests.support.parity import PeftReference, assert_parity, make_adapters, mixed_work

HIDDEN, VOCABULARY, RANK = 8, 20, 3


def test_rows_without_a_change_keep_every_bit() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, HIDDEN), torch.randn(6, VOCABULARY)
    pair = LoraPair(torch.randn(RANK, HIDDEN), torch.randn(VOCABULARY, RANK), torch.randn(VOCABULARY))
    whole = HeadDelta(weight=torch.randn(VOCABULARY, HIDDEN), bias=torch.randn(VOCABULARY))
    before = y.clone()
    apply_head(y, x, [HeadRows(1, 3, HeadDelta(pair=pair)), HeadRows(4, 5, whole)])
    for row in (0, 3, 5):
        assert torch.equal(y[row], before[row])
    assert pair.gain is not None
    torch.testing.assert_close(y[1:3], pair.gain * before[1:3] + x[1:3] @ pair.a.T @ pair.b.T)
    assert whole.weight is not None
    assert whole.bias is not None
    torch.testing.assert_close(y[4], whole.weight @ x[4] + whole.bias)


def test_tokens_of_other_adapters_keep_every_bit() -> None:
    torch.manual_seed(0)
    delta = EmbeddingDelta(torch.randn(VOCABULARY, RANK), torch.randn(HIDDEN, RANK))
    ids, y = torch.tensor([4, 7, 7, 19]), torch.randn(4, HIDDEN)
    before = y.clone()
    add_embedding(y, ids, [EmbeddingRows(1, 2, delta)])
    for row in (0, 2, 3):
        assert torch.equal(y[row], before[row])
    torch.testing.assert_close(y[1], before[1] + delta.b @ delta.a[7])


def test_adapters_of_tied_ends_change_one_end_each(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    base = write_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapters = make_adapters(base, tmp_path, architecture, ["ends-8", "whole-head-4", "few-4"])
    engine = make_engine(base, tmp_path / "cache", FolderFetcher(adapters))
    assert_parity(engine, PeftReference(base, adapters, nf4=False), mixed_work(list(adapters), count=12))
    engine.adapters.close()


def test_what_the_ends_take_counts_against_the_budgets(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    adapters = make_adapters(base, tmp_path, ARCHITECTURES["llama"], ["whole-head-4", "few-4"])
    head_bytes = 264 * 64 * 4
    engine = make_engine(
        base,
        tmp_path / "cache",
        FolderFetcher(adapters),
        adapter_device_bytes=head_bytes,
        device_own_share=1.0,
    )
    engine.add(request("head", [10, 20], "whole-head-4", max_tokens=2))
    engine.add(request("few", [10, 20], "few-4", max_tokens=2))
    failed: dict[str, LorafleetError] = {}
    while engine.has_work:
        failed |= {event.request_id: event.error for event in engine.step() if event.error is not None}
    assert set(failed) == {"head"}
    assert failed["head"].reason == "adapter_too_large"
    engine.adapters.close()
