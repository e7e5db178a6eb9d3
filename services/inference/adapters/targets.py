"""Which modules of the base an adapter may change, and the base's own values there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from services.common.errors import FailedPrecondition, InvalidArgument


class BaseValues(Protocol):
    """The base's values that some kinds of adapters are read against."""

    def weight(self, name: str) -> Tensor:
        """Return the weight [out, in] of the linear layer `name` in float32, dequantised where needed."""
        ...

    def bias(self, name: str) -> Tensor | None:
        """Return the bias [out] of the linear layer `name` in float32; None where it has none."""
        ...

    def embedding_scale(self) -> float:
        """Return what the input embedding multiplies its rows by: 1 for most architectures."""
        ...


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """The modules of a base model, seen by an adapter.

    Attributes:
        shapes: every linear layer inside the decoder's layers: its name to (in features, out features).
        others: the linear layers outside them that may not be adapted, likewise.
        head: the output head and its shape; `in features` is the hidden size, `out features` the vocabulary.
        embedding: the input embedding and its shape, (vocabulary, hidden size).
        experts: the modules that hold the weights of mixture-of-experts layers.
        values: the base's values.
    """

    shapes: Mapping[str, tuple[int, int]]
    others: Mapping[str, tuple[int, int]]
    head: tuple[str, tuple[int, int]]
    embedding: tuple[str, tuple[int, int]]
    experts: frozenset[str]
    values: BaseValues

    def __contains__(self, name: str) -> bool:
        return name in self.shapes or name == self.head[0]

    def check_linear(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a change of (in, out) `shape` to the linear layer `name` unless it is served.

        Raises:
            FailedPrecondition: `adapter_module_unsupported` for expert layers and for linear layers that are
                neither inside the decoder's layers nor the output head.
            InvalidArgument: `base_mismatch` where the base has no such layer or another shape.
        """
        if any(name == expert or name.startswith(f"{expert}.") for expert in self.experts):
            raise _unsupported(name, "the experts of a mixture-of-experts base cannot be adapted")
        if name in self.others:
            raise _unsupported(name, "only linear layers of the decoder and its output head are served")
        _check(name, shape, self.head[1] if name == self.head[0] else self.shapes.get(name), "linear layer")

    def check_embedding(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a change of (vocabulary, hidden) `shape` to the embedding `name` unless it is the input one.

        Raises:
            InvalidArgument: `base_mismatch`.
        """
        _check(name, shape, self.embedding[1] if name == self.embedding[0] else None, "input embedding")


def _check(name: str, shape: tuple[int, int], expected: tuple[int, int] | None, what: str) -> None:
    if expected is None:
        message = f"The base has no {what} {name}."
        raise InvalidArgument("base_mismatch", message, field="weights", value=name)
    if shape != expected:
        message = f"Layer {name}: the adapter is for (in, out) {shape}, the base has {expected}."
        raise InvalidArgument("base_mismatch", message, field="weights", value=shape, limit=expected)


def _unsupported(name: str, why: str) -> FailedPrecondition:
    message = f"The adapter changes {name}; {why}."
    return FailedPrecondition("adapter_module_unsupported", message, field="weights", value=name)
