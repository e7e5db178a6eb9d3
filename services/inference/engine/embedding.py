"""The mean of a prompt's last hidden states, summed up while its chunks are computed."""

from __future__ import annotations

from torch import Tensor

from services.inference.engine.batch import Batch


def add_hidden(batch: Batch, hidden: Tensor) -> None:
    """Add hidden states [logit rows, hidden] to the sums of the sequences that want them.

    After a preemption the prompt is run again; what has been added is skipped.
    """
    for span in batch.logit_spans:
        sequence = span.sequence
        if not sequence.request.embeds:
            continue
        done = sequence.num_hidden
        end = span.position + span.end - span.start
        if span.position <= done < end:
            rows = hidden[span.start + done - span.position : span.end]
            part = rows.double().sum(dim=0)
            sequence.hidden_sum = part if sequence.hidden_sum is None else sequence.hidden_sum + part
            sequence.num_hidden = end
