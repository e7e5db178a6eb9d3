"""The compiled kernels against their torch twins, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from services.inference.adapters.ops import add_lora_reference
from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.weights import AdapterWeights, LoraPair
from services.inference.kernels.attention import KernelAttention
from services.inference.kernels.build import BuildError, build_library
from services.inference.kernels.library import Kernels, load_kernels
from services.inference.kernels.linear import KernelLayer, KernelLinear
from services.inference.model.attention import DecodeGroup, _decode
from services.inference.model.kv import KvShape, PagedKv
from services.inference.model.plain_attention import ScoreChanges

IN = 72
WIDTHS = {"q": 64, "k": 24, "v": 24}
RANKS = (4, 16, 5, 64)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_kernels()
    if found is None:
        pytest.skip("no C compiler here")
    return found


@pytest.fixture(scope="module")
def linears() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    made = {name: nn.Linear(IN, width, bias=name == "k") for name, width in WIDTHS.items()}
    for module in made.values():
        module.requires_grad_(requires_grad=False)
    return made


def make_adapter(rank: int, *, seed: int, names: tuple[str, ...] = ("q", "k", "v")) -> AdapterWeights:
    """An adapter with a gain on q and a shift on v when the seed is odd."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    pairs = {
        name: LoraPair(
            noise(rank, IN),
            noise(WIDTHS[name], rank),
            noise(WIDTHS[name]) if seed % 2 and name == "q" else None,
            noise(WIDTHS[name]) if seed % 2 and name == "v" else None,
        )
        for name in names
    }
    return AdapterWeights(pairs)


def layer_of(linears: dict[str, nn.Linear], *, with_base: bool = True) -> KernelLayer:
    return KernelLayer.of(list(enumerate(linears.values())), with_base=with_base)


def expected(linears: dict[str, nn.Linear], x: Tensor, adapters: list[AdapterWeights | None]) -> list[Tensor]:
    outputs = []
    for name, module in linears.items():
        y = module(x[0])
        add_lora_reference(y, x[0], adapters, name)
        outputs.append(y)
    return outputs


def rows_of(adapters: list[AdapterWeights | None]) -> list[AdapterRows]:
    return [AdapterRows(row, row + 1, weights) for row, weights in enumerate(adapters) if weights is not None]


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 48, 70])
@torch.inference_mode()
def test_every_row_gets_the_base_and_its_own_adapter(
    kernels: Kernels, linears: dict[str, nn.Linear], rows: int
) -> None:
    torch.manual_seed(rows)
    x = torch.randn(1, rows, IN)
    some = [make_adapter(rank, seed=seed) for seed, rank in enumerate(RANKS)]
    some.append(make_adapter(8, seed=9, names=("k",)))
    choices: list[AdapterWeights | None] = [*some, None]
    adapters = [choices[row % len(choices)] for row in range(rows)]
    linear = KernelLinear(kernels, {name: row for row, name in enumerate(linears)})
    linear.begin(rows_of(adapters), rows)
    for got, wanted in zip(linear.project(layer_of(linears), x), expected(linears, x, adapters), strict=True):
        torch.testing.assert_close(got[0], wanted, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_many_rows_of_one_adapter_and_adapters_beside_another_base(
    kernels: Kernels, linears: dict[str, nn.Linear]
) -> None:
    torch.manual_seed(1)
    x, weights = torch.randn(1, 33, IN), make_adapter(10, seed=3)
    linear = KernelLinear(kernels, {name: row for row, name in enumerate(linears)})
    linear.begin([AdapterRows(5, 30, weights)], 33)
    adapters: list[AdapterWeights | None] = [weights if 5 <= row < 30 else None for row in range(33)]
    wanted = expected(linears, x, adapters)
    for got, want in zip(linear.project(layer_of(linears), x), wanted, strict=True):
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)
    for row, (name, module) in enumerate(linears.items()):
        y = module(x)
        linear.adapt(KernelLayer.of([(row, module)], with_base=False), x, y)
        torch.testing.assert_close(y[0], wanted[list(linears).index(name)], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_in_any_company(
    kernels: Kernels, linears: dict[str, nn.Linear]
) -> None:
    torch.manual_seed(2)
    x = torch.randn(1, 52, IN)
    some = [make_adapter(rank, seed=seed) for seed, rank in enumerate(RANKS)]
    adapters: list[AdapterWeights | None] = [some[row // 13] for row in range(52)]
    linear, layer = KernelLinear(kernels, {name: row for row, name in enumerate(linears)}), layer_of(linears)
    groups = [AdapterRows(13 * index, 13 * index + 13, weights) for index, weights in enumerate(some)]
    linear.begin(groups, 52)
    together = linear.project(layer, x)
    for row, weights in enumerate(adapters):
        assert weights is not None
        linear.begin([AdapterRows(0, 1, weights)], 1)
        alone = linear.project(layer, x[:, row : row + 1])
        assert all(torch.equal(one[0, 0], all_[0, row]) for one, all_ in zip(alone, together, strict=True))


@torch.inference_mode()
def test_after_the_step_no_adapter_is_bound(kernels: Kernels, linears: dict[str, nn.Linear]) -> None:
    x, layer = torch.randn(1, 4, IN), layer_of(linears)
    linear = KernelLinear(kernels, {name: row for row, name in enumerate(linears)})
    linear.begin([AdapterRows(0, 4, make_adapter(8, seed=1))], 4)
    assert linear.has_adapters
    linear.end()
    for got, want in zip(linear.project(layer, x), expected(linears, x, [None] * 4), strict=True):
        torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("lengths", [(1,), (5, 33, 16, 17), (100, 2)])
@torch.inference_mode()
def test_decode_attention_over_pages(kernels: Kernels, lengths: tuple[int, ...], window: int | None) -> None:
    torch.manual_seed(3)
    heads, kv_heads, head_dim, block_size = 6, 2, 80, 4
    width = -(-max(lengths) // block_size)
    kv = PagedKv(
        KvShape(1, kv_heads, head_dim, block_size, torch.float32), width * len(lengths), torch.device("cpu")
    )
    kv.keys[0].normal_()
    kv.values[0].normal_()
    tables = torch.randperm(width * len(lengths)).view(len(lengths), width)
    queries = torch.randn(heads, len(lengths), head_dim).transpose(0, 1)
    rows = torch.randperm(len(lengths))
    group = DecodeGroup(rows, tables, torch.tensor(lengths), max(lengths))
    wanted = _decode(kv, 0, group, queries[rows], 0.1, window, ScoreChanges())
    attention = KernelAttention(kernels)
    assert attention.serves(queries, kv.keys[0], ScoreChanges())
    got = torch.full((len(lengths), heads, head_dim), torch.nan)
    attention.attend(
        got,
        queries,
        (kv.keys[0], kv.values[0]),
        rows,
        tables,
        group.lengths,
        max_length=max(lengths),
        scaling=0.1,
        window=window,
        changes=ScoreChanges(),
    )
    torch.testing.assert_close(got[rows], wanted, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_an_undefined_query_stays_undefined(kernels: Kernels) -> None:
    kv = PagedKv(KvShape(1, 1, 16, 4, torch.float32), 1, torch.device("cpu"))
    got = torch.zeros(1, 1, 16)
    zero = torch.zeros(1, dtype=torch.long)
    KernelAttention(kernels).attend(
        got,
        torch.full((1, 1, 16), torch.nan),
        (kv.keys[0], kv.values[0]),
        zero,
        zero[None],
        zero + 3,
        max_length=3,
        scaling=1.0,
        window=None,
        changes=ScoreChanges(),
    )
    assert got.isnan().all()


def test_a_library_is_compiled_once(kernels: Kernels, tmp_path: Path) -> None:
    first = build_library(tmp_path / "cache")
    made = first.stat().st_mtime_ns
    assert build_library(tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_without_a_usable_compiler_there_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no headers" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert load_kernels() is None
    assert "no headers" in caplog.text
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    with pytest.raises(BuildError, match="no C compiler"):
        build_library(tmp_path / "cache")


def test_a_folder_that_others_can_write_is_refused(kernels: Kernels, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(BuildError, match="other users"):
        build_library(shared)
