"""Decode steps that are padded and replayed give what the steps alone do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from services.inference import assembly
from services.inference.engine.batch import Batch
from services.inference.engine.engine import Engine
from services.inference.engine.events import TokenEvent
from services.inference.engine.graphs import MAX_RANK, DecodeGraphs, Outputs, Replay, row_sizes
from tests.support.architectures import write_tiny_model
from tests.support.engines import FolderFetcher, make_engine, request, run_all, tokens_of
from tests.support.models import ALL_LINEAR_TARGETS, make_peft_adapter, make_tiny_llama

RANKS = (4, 7, 16)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation with the very tensors it took and made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor | tuple | list):
            raise RuntimeError(f"{func} reads a value back")
        self.operations.append((func, args, kwargs or {}, result))
        return result


class Recording:
    """Captures as CUDA does: a replay runs the operations again, in the same memory, and no Python."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, step: Replay, num_rows: int, max_rank: int) -> Replay:
        self.sizes.append((num_rows, max_rank))
        with Recorder() as recorder:
            outputs = step()

        def replay() -> Outputs:
            for func, args, kwargs, result in recorder.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(result), tensors(again), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)
            return outputs

        return replay


def tensors(result: Any) -> list[Tensor]:
    return [
        part
        for part in (result if isinstance(result, tuple | list) else [result])
        if isinstance(part, Tensor)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        f"a{rank}": make_peft_adapter(
            base, folder / f"a{rank}", r=rank, targets=ALL_LINEAR_TARGETS, seed=rank
        )
        for rank in RANKS
    }
    made["wide"] = make_peft_adapter(base, folder / "wide", r=MAX_RANK + 1, seed=1)
    made["head"] = make_peft_adapter(base, folder / "head", r=4, targets=("q_proj", "lm_head"), seed=2)
    return made


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows of every replayed step, and what they were padded to."""
    seen: list[tuple[int, int]] = []
    run = DecodeGraphs.run

    def noting(graphs: DecodeGraphs, batch: Batch, num_rows: int) -> Outputs:
        seen.append((batch.input_ids.shape[1], num_rows))
        return run(graphs, batch, num_rows)

    monkeypatch.setattr(DecodeGraphs, "run", noting)
    return seen


def serve(engine: Engine, names: Sequence[str | None]) -> dict[str, list[TokenEvent]]:
    """Decode a row for each of `names`, of unlike lengths, the first for longer; then close the engine."""
    for number, name in enumerate(names):
        prompt = [6 + (7 * number + 3 * at) % 250 for at in range(3 + 9 * number)]
        tokens = 12 if number else 30
        engine.add(
            request(str(number), prompt, name, max_tokens=tokens + number, ignore_eos=True, logprobs=2)
        )
    events = run_all(engine)
    engine.adapters.close()
    return events


def assert_same(got: dict[str, list[TokenEvent]], wanted: dict[str, list[TokenEvent]]) -> None:
    assert got.keys() == wanted.keys()
    for name, events in wanted.items():
        assert tokens_of(got[name]) == tokens_of(events), name
        for one, other in zip(got[name], events, strict=True):
            assert [item.logprob for item in one.logprobs] == pytest.approx(
                [item.logprob for item in other.logprobs], abs=1e-4
            )


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_padded_steps_choose_the_same_tokens(
    kernels: str,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    replayed: list[tuple[int, int]],
) -> None:
    names = [None, "a4", "a7", None, "a16", "a4", "a7", None, "a16", "a4", None]
    engines = [
        make_engine(base, tmp_path / mode, FolderFetcher(adapters), kernels=kernels, decode_graphs=mode)
        for mode in ("off", "eager")
    ]
    plain = serve(engines[0], names)
    assert not replayed
    assert_same(serve(engines[1], names), plain)
    # Adapters come when they have been loaded, so the sizes in between depend on that.
    assert (1, 1) in replayed
    assert all(rows == min(size for size in row_sizes(32) if size >= tokens) for tokens, rows in replayed)


def test_padding_leaves_the_pages_of_sequences_alone(
    base: Path, tmp_path: Path, replayed: list[tuple[int, int]]
) -> None:
    engines = [
        make_engine(base, tmp_path / mode, FolderFetcher({}), decode_graphs=mode) for mode in ("off", "eager")
    ]
    for engine in engines:
        serve(engine, [None] * 3)
    assert (3, 4) in replayed
    for layer in range(2):
        pages, padded = (engine._kv.keys[layer][: engine._kv.num_blocks] for engine in engines)
        torch.testing.assert_close(padded, pages, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 7}),
        ("gemma2", {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16}),
    ],
)
def test_a_recorded_step_serves_later_batches(
    model_type: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replayed: list[tuple[int, int]],
) -> None:
    """Nothing of a step may depend on Python that has run when it was captured, or the replays go wrong."""
    base = write_tiny_model(tmp_path / "base", model_type, **settings)
    recording = Recording()
    monkeypatch.setattr(assembly, "run_again", recording)
    make = {"kernels": "torch", "max_num_seqs": 6, "max_model_len": 128}
    plain = make_engine(base, tmp_path / "off", FolderFetcher({}), **make)
    recorded = make_engine(base, tmp_path / "on", FolderFetcher({}), decode_graphs="eager", **make)
    assert recording.sizes == [(rows, rank) for rows in (6, 4, 2, 1) for rank in (MAX_RANK, 0)]
    names = [None] * 8
    assert_same(serve(recorded, names), serve(plain, names))
    assert {rows for _, rows in replayed} == {6, 4, 2, 1}


@pytest.mark.parametrize(("name", "is_replayed"), [("wide", False), ("head", False), ("a4", True)])
def test_what_is_not_captured_runs_as_it_is(
    name: str,
    is_replayed: bool,
    base: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    replayed: list[tuple[int, int]],
) -> None:
    plain = make_engine(base, tmp_path / "off", FolderFetcher(adapters))
    padded = make_engine(base, tmp_path / "on", FolderFetcher(adapters), decode_graphs="eager")
    wanted = serve(plain, [name, name])
    assert_same(serve(padded, [name, name]), wanted)
    assert bool(replayed) == is_replayed


def test_results_outlive_the_next_replay(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "run_again", Recording())
    engine = make_engine(
        base, tmp_path, FolderFetcher({}), kernels="torch", max_num_seqs=2, decode_graphs="eager"
    )
    results: list[tuple[Outputs, Outputs]] = []
    run = DecodeGraphs.run

    def keeping(graphs: DecodeGraphs, batch: Batch, num_rows: int) -> Outputs:
        logits, hidden = run(graphs, batch, num_rows)
        results.append(((logits, hidden), (logits.clone(), hidden.clone())))
        return logits, hidden

    monkeypatch.setattr(DecodeGraphs, "run", keeping)
    serve(engine, [None])
    assert len(results) == 29
    for kept, copied in results:
        assert torch.equal(kept[0], copied[0])
        assert torch.equal(kept[1], copied[1])


def test_a_base_that_cannot_be_captured_is_served_without(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    replayed: list[tuple[int, int]],
) -> None:
    def fails_at_one_row(step: Replay, num_rows: int, max_rank: int) -> Replay:
        if num_rows == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    monkeypatch.setattr(assembly, "run_again", fails_at_one_row)
    engine = make_engine(base, tmp_path, FolderFetcher({}), decode_graphs="eager")
    assert "not permitted when stream is capturing" in caplog.text
    assert len(tokens_of(serve(engine, [None, None])["1"])) == 13
    assert not replayed


def test_sizes_without_memory_are_left_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replayed: list[tuple[int, int]]
) -> None:
    def small_only(step: Replay, num_rows: int, max_rank: int) -> Replay | None:
        return step if num_rows <= 2 else None

    monkeypatch.setattr(assembly, "run_again", small_only)
    engine = make_engine(base, tmp_path, FolderFetcher({}), decode_graphs="eager")
    serve(engine, [None, None, None])
    assert set(replayed) == {(1, 1), (2, 2)}


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 16]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]),
    ],
)
def test_row_sizes(max_rows: int, sizes: list[int]) -> None:
    assert row_sizes(max_rows) == sizes
