"""What the trained model makes of a few rows, to compare with what is served."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.trainer.parity import PROBE_ROWS, PROBE_TOKENS, Probe
from services.trainer.tokens import TokenRow
from services.trainer.training.model import AdapterModel


def probe(model: AdapterModel, rows: Sequence[TokenRow]) -> tuple[Probe, ...]:
    """Return probes of the first rows that are long enough to have something predicted.

    Each row runs alone and is cut to `PROBE_TOKENS`; the model computes as it is, adapter on, dropout off.
    """
    chosen = [row.ids[:PROBE_TOKENS] for row in rows if len(row.ids) > 1][:PROBE_ROWS]
    return tuple(Probe(ids, _logprobs(model, ids)) for ids in chosen)


def _logprobs(model: AdapterModel, ids: tuple[int, ...]) -> tuple[float, ...]:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model.logits(tokens, torch.ones_like(tokens), torch.arange(len(ids) - 1))
    scores = torch.log_softmax(logits[0], dim=-1).cpu()
    picked = scores.gather(1, tokens[0, 1:, None]).squeeze(1)
    return tuple(float(value) for value in picked)
