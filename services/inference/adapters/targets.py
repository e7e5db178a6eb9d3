"""Which modules of the base an adapter may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraTargets:
    """The modules of a base model, seen by an adapter.

    Attributes:
        shapes: every linear layer that may be adapted: its name to (in features, out features).
        others: the linear layers that may not, such as the output head, likewise.
    """

    shapes: Mapping[str, tuple[int, int]]
    others: Mapping[str, tuple[int, int]]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    @property
    def module_table(self) -> Mapping[str, tuple[int, int]]:
        """All linear layers of the base."""
        return {**self.shapes, **self.others}
