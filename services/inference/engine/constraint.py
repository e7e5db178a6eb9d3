"""A compiled constraint on the output, and how far one sequence has come in it."""

from __future__ import annotations

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from services.common.errors import InvalidArgument


class Constraint:
    """What many sequences may start from; its matcher stays at the beginning. Used on the engine's thread."""

    def __init__(self, matcher: LLMatcher, field: str, reason: str) -> None:
        """Wrap a matcher that nobody else uses; `field` and `reason` are those of errors."""
        self._matcher = matcher
        self._field = field
        self._reason = reason
        self.is_spoiled = False
        """Whether a sequence exceeded the limits of what all of them share."""

    def start(self) -> ConstraintState:
        """Return the state of a new sequence."""
        return ConstraintState(self, self._matcher.deep_copy())

    def too_complex(self, error: str) -> InvalidArgument:
        """Return the error of a sequence that cannot go on, and see to it that no other starts from here."""
        self.is_spoiled = True
        why = (error.strip().splitlines() or ["no token fits"])[0][:200]
        return InvalidArgument(
            self._reason, f"{self._field} became too complex during generation: {why}.", field=self._field
        )


class ConstraintState:
    """How far one sequence has come."""

    def __init__(self, constraint: Constraint, matcher: LLMatcher) -> None:
        self._constraint = constraint
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the output is complete and nothing may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> None:
        """Make every token that may not come next impossible in `logits` [vocabulary], in place.

        End tokens stay possible only where the output is complete.

        Raises:
            InvalidArgument: the grammar exceeded its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise self._constraint.too_complex(self._matcher.get_error())
        allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]]
        if not allowed.any():
            raise self._constraint.too_complex("")
        logits.masked_fill_(torch.from_numpy(allowed == 0).to(logits.device), -torch.inf)

    def accept(self, token_id: int) -> None:
        """Go on behind a token that the mask allowed.

        Raises:
            InvalidArgument: the grammar exceeded its limits.
        """
        if not self._matcher.consume_token(token_id):
            raise self._constraint.too_complex(self._matcher.get_error())
