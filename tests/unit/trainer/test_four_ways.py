"""Four ways to serve one adapter, and why it is served on the 4-bit values that it was trained on.

The bundled base learns a task in NF4. Then the same adapter is put on the NF4 base, on those values expanded
to float32 and merged, on the base as it was before quantisation, and merged into the 4-bit weights. Only the
first two are what was
trained; merging into four bits loses most.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from services.common.base_loading import load_base_model
from services.common.fingerprint import ComputeDtype, Quantization
from services.trainer.dataset import PromptRow
from services.trainer.tokens import TokenRow
from services.trainer.training.base import BaseFolder
from services.trainer.training.weights import base_weight
from tests.support.models import load_peft_adapters
from tests.support.training import Observer, load_shared, new_run, tiny_spec, train_alone

BASE = Path(__file__).parents[3] / "assets" / "base"
NF4 = Quantization.nf4(ComputeDtype.FLOAT32)
FULL = Quantization.none(ComputeDtype.FLOAT32)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Mean loss on the task in nats, and the log-probabilities [tokens, vocabulary] that it is made of."""

    loss: float
    logprobs: Tensor

    def divergence(self, reference: Outcome) -> float:
        """Return the mean KL divergence of the reference from this."""
        return float(
            functional.kl_div(self.logprobs, reference.logprobs, log_target=True, reduction="batchmean")
        )


def memorable_rows(count: int) -> list[TokenRow]:
    """Return rows of random tokens: what follows is to be learned by heart."""
    # Not for secrets: the same rows every time.
    drawn = random.Random(5)
    made = []
    for index in range(count):
        ids = tuple(drawn.randrange(300, 3000) for _ in range(16))
        made.append(TokenRow(ids, (*[False] * 8, *[True] * 8), 8, PromptRow(index + 1, str(index), "c")))
    return made


def outcome(model: Any, rows: list[TokenRow]) -> Outcome:
    loss, count, columns = 0.0, 0, []
    for row in rows:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].float().log_softmax(-1)
        counts = torch.tensor(row.supervised[1:])
        columns.append(scores[counts])
        loss -= float(scores[counts].gather(1, torch.tensor(row.ids[1:])[counts, None]).sum())
        count += int(counts.sum())
    return Outcome(loss / count, torch.cat(columns))


def plain_base(quantization: Quantization) -> PreTrainedModel:
    return load_base_model(BASE, quantization, device=CPU, attention="sdpa")


def merged(adapter: Path, values: dict[str, Tensor]) -> Any:
    """Return the base with `values` for its linear layers and the adapter added into them."""
    base = plain_base(FULL)
    for name, value in values.items():
        linear = base.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            linear.weight.copy_(value)
    return load_peft_adapters(base, {"a": adapter}).merge_and_unload()


def requantised(model: Any, names: list[str]) -> Any:
    """Return `model` with its linear layers rounded to NF4 once more."""
    for name in names:
        weight = model.get_submodule(name).weight
        packed, state = bnb.functional.quantize_4bit(
            weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        weight.data = bnb.functional.dequantize_4bit(packed, state)
    return model


def four_ways(tmp_path: Path, count: int, epochs: int) -> dict[str, Outcome]:
    rows = memorable_rows(count)
    folder = BaseFolder("base", BASE, NF4)
    shared = load_shared(folder)
    spec = tiny_spec(
        folder, rank=16, learning_rate=3e-3, n_epochs=epochs, batch_size=8, checkpoint_steps=1000
    )
    run = new_run(shared, spec, Observer(tmp_path / "run"), rows=rows, validation_rows=[])
    train_alone(run)
    adapter = tmp_path / "adapter"
    run.model.save(adapter, "base")
    values = {name: base_weight(linear) for name, linear in shared.linears.items()}
    on_nf4 = load_peft_adapters(plain_base(NF4), {"a": adapter})
    on_full = load_peft_adapters(plain_base(FULL), {"a": adapter})
    return {
        "nf4": outcome(on_nf4, rows),
        "expanded": outcome(merged(adapter, values), rows),
        "pristine": outcome(on_full, rows),
        "requantised": outcome(requantised(merged(adapter, values), list(values)), rows),
    }


def check(found: dict[str, Outcome], *, pristine: float, requantised: float) -> None:
    served = found["nf4"]
    assert found["expanded"].loss == pytest.approx(served.loss, rel=1e-3)
    assert found["expanded"].divergence(served) < 1e-5
    assert found["pristine"].loss > (1 + pristine) * served.loss
    assert found["requantised"].loss > (1 + requantised) * served.loss
    assert found["requantised"].divergence(served) > found["pristine"].divergence(served) > 1e-3


def test_adapter_is_served_on_the_values_that_it_was_trained_on(tmp_path: Path) -> None:
    found = four_ways(tmp_path, 24, 20)
    check(found, pristine=0.03, requantised=0.15)
