"""Training several jobs in one pass: one forward and one backward through the base they share.

No parameter is shared, and every operation of the base works on each token or each row alone, so summing the
losses gives each job the gradient that it would have alone. A job whose loss is not finite spoils nobody
else's for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from services.trainer.training.base import Part, SharedBase
from services.trainer.training.batches import join
from services.trainer.training.loop import TrainingRun
from services.trainer.training.loss import token_losses


def shared_pass(base: SharedBase, runs: Sequence[TrainingRun]) -> dict[TrainingRun, Exception]:
    """Do the next forward and backward pass of every run; a run whose step that completes takes it.

    Args:
        runs: runs on `base` that are not done.

    Returns:
        What ended runs early, whether it was an order, a guard or a failure; the other runs go on.
    """
    ended: dict[TrainingRun, Exception] = {}
    batches = []
    live = []
    for run in runs:
        try:
            batches.append(run.next_pass())
        except Exception as error:  # noqa: BLE001 - it ends this run alone, and is handed on
            ended[run] = error
        else:
            live.append(run)
    if not live:
        return ended
    parts = []
    start = 0
    for run, batch in zip(live, batches, strict=True):
        parts.append(Part(run.model.adapter, start, start + batch.num_tokens))
        start += batch.num_tokens
    joined = join(batches)
    counts = torch.tensor([batch.num_counted for batch in batches])
    weights = torch.tensor([run.loss_weight for run in live]).repeat_interleave(counts)
    with base.adapting(parts):
        losses = token_losses(base.counted_logits(joined), joined.targets)
        losses.backward(weights.to(losses.device))  # type: ignore[no-untyped-call]
    sums = [float(part.sum()) for part in losses.detach().cpu().tensor_split(counts.cumsum(0)[:-1])]
    for run, loss_sum in zip(live, sums, strict=True):
        try:
            run.finish_pass(loss_sum)
        except Exception as error:  # noqa: BLE001 - as above
            ended[run] = error
    return ended
