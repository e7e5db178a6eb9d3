"""One step's work as flat tensors."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from services.inference.adapters.ends import EmbeddingRows, HeadRows
from services.inference.adapters.ops import AdapterGroup, AdapterStack
from services.inference.adapters.slots import StackCache
from services.inference.adapters.tables import AdapterRows
from services.inference.adapters.weights import AdapterWeights
from services.inference.engine.scheduler import Chunk
from services.inference.engine.sequence import Sequence
from services.inference.model.attention import AttentionStep, DecodeGroup, PrefillSpan
from services.inference.model.kv import PagedKv

# Decoding sequences are attended to in groups whose longest is at most this many times its shortest.
_LENGTH_SPREAD = 2


@dataclass(frozen=True, slots=True)
class LogitSpan:
    """Rows `start` to `end` of the step's logits belong to `sequence`.

    The rows are those after the tokens at positions `position`, `position + 1`, and so on. With `samples` the
    last row follows the last token there is, so the next token is chosen from it.
    """

    sequence: Sequence
    start: int
    end: int
    position: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What the runner needs for one step; [tokens] are ordered decodes first, each part sorted by adapter.

    Attributes:
        input_ids: [1, tokens].
        position_ids: [1, tokens].
        adapter_groups: what the torch forms of the linear layers take; empty where the kernels run.
        logit_rows: [rows] the tokens whose logits are wanted.
        adapter_rows: what the kernels take.
    """

    chunks: Items[Chunk]
    input_ids: Tensor
    position_ids: Tensor
    attention: AttentionStep
    adapter_groups: tuple[AdapterGroup, ...]
    logit_rows: Tensor
    logit_spans: Items[LogitSpan]
    embedding_rows: tuple[EmbeddingRows, ...] = ()
    head_rows: tuple[HeadRows, ...] = ()
    adapter_rows: tuple[AdapterRows, ...] = ()


def build_batch(chunks: Items[Chunk], kv: PagedKv, stacks: StackCache | None, device: torch.device) -> Batch:
    """Lay the chunks out as one flat batch and find the rows of each adapter, once for all layers.

    Without `stacks` adapters are not grouped for the torch forms.
    """
    decodes = [chunk for chunk in chunks if chunk.length == 1]
    prefills = sorted((chunk for chunk in chunks if chunk.length > 1), key=_adapter_key)
    if stacks is None:
        groups: tuple[AdapterGroup, ...] = ()
        ordered = sorted(decodes, key=_adapter_key) + prefills
    else:
        runs = _runs(decodes)
        groups = _adapter_groups(runs, prefills, stacks)
        ordered = [chunk for run in runs for chunk in run.chunks] + prefills
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    size = kv.shape.block_size
    for chunk in ordered:
        sequence, start = chunk.sequence, chunk.sequence.num_computed
        tokens += sequence.token_ids[start : start + chunk.length]
        positions += range(start, start + chunk.length)
        slots += [sequence.blocks[p // size] * size + p % size for p in range(start, start + chunk.length)]
    logit_rows, logit_spans = _logits(ordered)
    attention = AttentionStep(
        kv=kv,
        slots=torch.tensor(slots, device=device),
        decodes=_decode_groups(ordered[: len(decodes)], device),
        prefills=_prefill_spans(prefills, len(decodes), device),
    )
    return Batch(
        chunks=ordered,
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention=attention,
        adapter_groups=groups,
        logit_rows=torch.tensor(logit_rows, dtype=torch.long, device=device),
        logit_spans=logit_spans,
        embedding_rows=_embedding_rows(ordered),
        head_rows=_head_rows(logit_spans),
        adapter_rows=_adapter_rows(ordered),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Decoding sequences whose adapters have one shape and equally many sequences each; sorted by adapter."""

    chunks: list[Chunk]
    digests: list[str]


def _runs(decodes: list[Chunk]) -> list[_Run]:
    by_adapter = [
        (key, list(items)) for key, items in groupby(sorted(decodes, key=_adapter_key), _adapter_key)
    ]
    base = [chunk for key, items in by_adapter for chunk in items if not key]
    stackable: dict[object, list[list[Chunk]]] = {}
    for key, items in by_adapter:
        if key:
            adapter = items[0].sequence.adapter
            assert adapter is not None
            stackable.setdefault((adapter.shape_key, len(items)), []).append(items)
    runs = [
        _Run([chunk for items in group for chunk in items], [_adapter_key(items[0]) for items in group])
        for group in stackable.values()
    ]
    return [_Run(base, []), *runs]


def _adapter_key(chunk: Chunk) -> str:
    return chunk.sequence.adapter_digest or ""


def _adapter_groups(runs: list[_Run], prefills: list[Chunk], stacks: StackCache) -> tuple[AdapterGroup, ...]:
    stacks.begin_step()
    groups = []
    row = 0
    for run in runs:
        if run.digests:
            groups += _stacked_or_single(run, row, stacks)
        row += len(run.chunks)
    for key, items in groupby(prefills, _adapter_key):
        same = list(items)
        end = row + sum(chunk.length for chunk in same)
        if key:
            groups.append(AdapterGroup(row, end, _stack(stacks, same[0])))
        row = end
    return tuple(groups)


def _stacked_or_single(run: _Run, row: int, stacks: StackCache) -> list[AdapterGroup]:
    each = len(run.chunks) // len(run.digests)
    firsts = run.chunks[::each]
    stack = stacks.stack(run.digests, [_weights(chunk) for chunk in firsts])
    if stack is not None:
        return [AdapterGroup(row, row + len(run.chunks), stack)]
    return [
        AdapterGroup(row + index * each, row + (index + 1) * each, _stack(stacks, chunk))
        for index, chunk in enumerate(firsts)
    ]


def _stack(stacks: StackCache, chunk: Chunk) -> AdapterStack:
    stack = stacks.stack([_adapter_key(chunk)], [_weights(chunk)])
    assert stack is not None
    return stack


def _weights(chunk: Chunk) -> AdapterWeights:
    weights = chunk.sequence.adapter
    assert weights is not None, "a sequence runs without its adapter"
    return weights


def _adapter_rows(ordered: list[Chunk]) -> tuple[AdapterRows, ...]:
    found = []
    row = 0
    for key, items in groupby(ordered, _adapter_key):
        same = list(items)
        end = row + sum(chunk.length for chunk in same)
        if key:
            found.append(AdapterRows(row, end, _weights(same[0])))
        row = end
    return tuple(found)


def _embedding_rows(ordered: list[Chunk]) -> tuple[EmbeddingRows, ...]:
    found = []
    row = 0
    for chunk in ordered:
        weights = chunk.sequence.adapter
        if weights is not None and weights.embedding is not None:
            found.append(EmbeddingRows(row, row + chunk.length, weights.embedding))
        row += chunk.length
    return tuple(found)


def _head_rows(spans: list[LogitSpan]) -> tuple[HeadRows, ...]:
    return tuple(
        HeadRows(span.start, span.end, span.sequence.adapter.head)
        for span in spans
        if span.sequence.adapter is not None and span.sequence.adapter.head is not None
    )


def _decode_groups(decodes: list[Chunk], device: torch.device) -> list[DecodeGroup]:
    """Group by length, so that a short sequence does not read as many pages as the longest."""
    by_length = sorted(enumerate(decodes), key=lambda item: item[1].sequence.num_computed)
    groups: list[DecodeGroup] = []
    rows: list[int] = []
    for row, chunk in by_length:
        shortest = decodes[rows[0]].sequence if rows else chunk.sequence
        if len(chunk.sequence.blocks) > _LENGTH_SPREAD * len(shortest.blocks):
            groups.append(_decode_group(rows, decodes, device))
            rows = []
        rows.append(row)
    if rows:
        groups.append(_decode_group(rows, decodes, device))
    return groups


def _decode_group(rows: list[int], decodes: list[Chunk], device: torch.device) -> DecodeGroup:
    sequences = [decodes[row].sequence for row in rows]
    width = max(len(sequence.blocks) for sequence in sequences)
    lengths = [sequence.num_computed + 1 for sequence in sequences]
    return DecodeGroup(
        rows=torch.tensor(rows, device=device),
        tables=torch.tensor(
            [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence in sequences], device=device
        ),
        lengths=torch.tensor(lengths, device=device),
        max_length=max(lengths),
    )


def _prefill_spans(prefills: list[Chunk], start: int, device: torch.device) -> list[PrefillSpan]:
    spans = []
    for chunk in prefills:
        sequence = chunk.sequence
        spans.append(
            PrefillSpan(
                start=start,
                length=chunk.length,
                context=sequence.num_computed,
                table=torch.tensor([sequence.blocks], device=device),
            )
        )
        start += chunk.length
    return spans


def _logits(ordered: list[Chunk]) -> tuple[list[int], list[LogitSpan]]:
    """Choose the rows to project: the last of each finished chunk, all of those that want every row."""
    rows: list[int] = []
    spans: list[LogitSpan] = []
    first = 0
    for chunk in ordered:
        sequence = chunk.sequence
        samples = chunk.length == sequence.num_pending
        if sequence.wants_every_row:
            wanted = list(range(first, first + chunk.length))
        else:
            wanted = [first + chunk.length - 1] if samples else []
        if wanted:
            position = sequence.num_computed + wanted[0] - first
            spans.append(LogitSpan(sequence, len(rows), len(rows) + len(wanted), position, samples))
            rows += wanted
        first += chunk.length
    return rows, spans
