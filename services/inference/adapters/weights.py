"""An adapter's weights as the engine uses them: per-module updates, with all that can be folded folded in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One linear layer's update: y becomes gain * y + shift + B (A x).

    Attributes:
        a: A [rank, in].
        b: B [out, rank], already multiplied by the scale, and by the gain where there is one.
        gain: [out], DoRA's magnitude over the norm of the adapted weight; None for 1.
        shift: [out], what the biases of the adapter add; None for 0.
    """

    a: Tensor
    b: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors there are."""
        return tuple(t for t in (self.a, self.b, self.gain, self.shift) if t is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> LoraPair:
        """Return the same with every tensor changed."""
        return LoraPair(change(self.a), change(self.b), _maybe(change, self.gain), _maybe(change, self.shift))


@dataclass(frozen=True, slots=True)
class HeadDelta:
    """The output head's update: a `pair`, or a whole layer in place of the base's, `weight` [vocabulary,
    hidden] and perhaps `bias` [vocabulary].
    """

    pair: LoraPair | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors there are."""
        whole = tuple(t for t in (self.weight, self.bias) if t is not None)
        return whole if self.pair is None else (*self.pair.tensors, *whole)

    def map(self, change: Callable[[Tensor], Tensor]) -> HeadDelta:
        """Return the same with every tensor changed."""
        pair = None if self.pair is None else self.pair.map(change)
        return HeadDelta(pair, _maybe(change, self.weight), _maybe(change, self.bias))


@dataclass(frozen=True, slots=True)
class EmbeddingDelta:
    """The input embedding's update: token t gets B a[t] more.

    Attributes:
        a: [vocabulary, rank], so that a token's row is one piece of memory.
        b: B [hidden, rank], already multiplied by the scales of the adapter and of the embedding.
    """

    a: Tensor
    b: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors there are."""
        return (self.a, self.b)

    def map(self, change: Callable[[Tensor], Tensor]) -> EmbeddingDelta:
        """Return the same with every tensor changed."""
        return EmbeddingDelta(change(self.a), change(self.b))


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter: its updates to the decoder's linear layers, by their names in the base, and to the ends of
    the model.
    """

    pairs: Mapping[str, LoraPair]
    head: HeadDelta | None = None
    embedding: EmbeddingDelta | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        found = [tensor for pair in self.pairs.values() for tensor in pair.tensors]
        for end in (self.head, self.embedding):
            if end is not None:
                found += end.tensors
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors, at the true rank of every module."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def max_rank(self) -> int:
        """The largest rank of any linear layer's update; 0 where none is changed."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    @cached_property
    def shape_key(self) -> tuple[tuple[str, int, bool, bool], ...]:
        """What two adapters must have in common to be stacked: the same linear layers, at the same ranks, and
        the same vectors. The ends of the model are never stacked.
        """
        return tuple(
            sorted(
                (name, pair.rank, pair.gain is not None, pair.shift is not None)
                for name, pair in self.pairs.items()
            )
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> AdapterWeights:
        """Return the weights on `device`; they share memory with these where they are there already."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> AdapterWeights:
        """Return a copy in page-locked host memory, from which copies to a GPU are asynchronous."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> AdapterWeights:
        return AdapterWeights(
            {name: pair.map(change) for name, pair in self.pairs.items()},
            None if self.head is None else self.head.map(change),
            None if self.embedding is None else self.embedding.map(change),
        )


def _maybe(change: Callable[[Tensor], Tensor], tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else change(tensor)
