"""One of a request's sequences while it is alive."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from services.inference.adapters.weights import AdapterWeights
from services.inference.engine.constraint import ConstraintState
from services.inference.engine.events import TokenLogprob
from services.inference.engine.prefix import Chain
from services.inference.engine.request import Request, SamplingParams
from services.inference.engine.text import TextStream


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """A growing run of tokens.

    Attributes:
        token_ids: prompt and output.
        num_computed: tokens whose keys and values are in the cache; the rest is still to be run.
        blocks: the block table.
        adapter: the weights on the device, while RUNNING; None for the base.
        seed: fixes the draws together with `index` and the position.
        chain: how far the block table is known to the prefix cache.
        num_cached: prompt tokens found computed when the request was first admitted; None before that.
        arrival: its place in the order of arrival.
        queued_at: when it arrived, on the engine's clock.
        queue_seconds: how long it then waited before it first ran; None while it waits.
        constraint: how far the output has come in the request's constraint.
        hidden_sum: of the first `num_hidden` tokens' last hidden states [hidden], where the request embeds.
    """

    request: Request
    index: int
    seed: int
    max_tokens: int
    text: TextStream
    token_ids: list[int]
    queued_at: float = 0.0
    queue_seconds: float | None = None
    num_computed: int = 0
    phase: Phase = Phase.WAITING
    blocks: list[int] = field(default_factory=list)
    adapter: AdapterWeights | None = None
    output_counts: Counter[int] = field(default_factory=Counter)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    constraint: ConstraintState | None = None
    hidden_sum: Tensor | None = None
    num_hidden: int = 0
    num_cached: int | None = None
    arrival: int = 0
    chain: Chain = field(init=False)

    def __post_init__(self) -> None:
        self.chain = Chain.at_root((self.request.tenant, self.request.adapter_digest))

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def adapter_digest(self) -> str | None:
        return self.request.adapter_digest

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens not yet computed: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be collected. Only sequence 0 collects
        them.
        """
        return (
            self.sampling.prompt_logprobs is not None
            and self.index == 0
            and len(self.prompt_logprobs) < self.num_prompt - 1
        )

    @property
    def wants_every_row(self) -> bool:
        """Whether every token of the prompt has to be run and its row of logits or hidden states be kept."""
        return self.request.embeds or self.wants_prompt_logprobs

    def append(self, token_id: int) -> None:
        """Add a chosen token."""
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1
