"""One forward pass of the base model, with the adapters that are bound."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from services.inference.model.attention import AttentionStep
from services.inference.model.loader import BaseModel


def forward(
    base: BaseModel, input_ids: Tensor, position_ids: Tensor, attention: AttentionStep, logit_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the tokens' keys and values to the pages, and return float32 logits [rows, vocabulary] and what
    the output head was given [rows, hidden].

    Args:
        input_ids: [1, tokens].
        position_ids: [1, tokens].
        logit_rows: [rows] the tokens whose logits are wanted.
    """
    output = base.model(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=logit_rows,
        step=replace(attention, kernel=base.attention),
    )
    hidden = base.binding.hidden
    assert hidden is not None, "the output head was run"
    logits: Tensor = output.logits[0]
    return logits.float(), hidden
