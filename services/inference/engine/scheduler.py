"""Who runs in the next step.

Running sequences go first, one token each while they decode, in order of admission; then unfinished prefills,
in chunks; then waiting sequences, in the order of the policy. The policy also bounds how much of a step the
prompts of one tenant may make up. A sequence whose adapter is still loading is passed over, as is one whose
prompt a sibling is just computing; one that lacks blocks or device memory stops admission, so that large
requests are not starved by small ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from services.inference.adapters.lease import Lease
from services.inference.engine.blocks import BlockPool
from services.inference.engine.policy import QueuePolicy
from services.inference.engine.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` pending tokens of `sequence`, to be run in this step."""

    sequence: Sequence
    length: int


@dataclass(frozen=True, slots=True)
class _Group:
    """The sequences of one request, and the lease they run under; None for the base."""

    sequences: tuple[Sequence, ...]
    lease: Lease | None


class _PromptRoom:
    """How much of one step each tenant's prompts may have; a crowd's come after those of others."""

    def __init__(self, policy: QueuePolicy, running: Iterable[Sequence], step_tokens: int) -> None:
        self._policy = policy
        self._running = list(running)
        self._step_tokens = step_tokens
        self._most: dict[str, int] = {}
        self._taken = 0

    def left(self, sequence: Sequence) -> int:
        """Return the tokens that `sequence` may run; one that decodes always may, and the policy is not asked
        for it: most steps have no prompt, and the answer takes a look at everybody.
        """
        if sequence.phase is Phase.RUNNING and sequence.num_pending == 1:
            return 1
        tenant = sequence.request.tenant
        if tenant not in self._most:
            self._most[tenant] = self._policy.prompt_tokens(tenant, self._running, self._step_tokens)
        return max(self._most[tenant] - self._taken, 0)

    def take(self, length: int) -> None:
        """Note tokens of a prompt; single ones are as good as decoding."""
        if length > 1:
            self._taken += length


class Scheduler:
    """Owns the waiting queue, the running list and the block tables' growth."""

    def __init__(
        self, blocks: BlockPool, policy: QueuePolicy, *, max_batch_tokens: int, max_num_seqs: int
    ) -> None:
        assert max_batch_tokens >= max_num_seqs, "every running sequence must be able to decode in each step"
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._groups: dict[str, _Group] = {}
        self._num_arrived = 0
        self.waiting = policy
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    def add(self, sequences: Iterable[Sequence], lease: Lease | None) -> None:
        """Queue the sequences of one request. `lease` is None for the base."""
        group = _Group(tuple(sequences), lease)
        self._groups[group.sequences[0].request.id] = group
        for sequence in group.sequences:
            sequence.arrival = self._num_arrived
            self._num_arrived += 1
            self.waiting.add(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose this step's chunks and give each its blocks."""
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        prompts = _PromptRoom(self.waiting, self.running, budget)
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending > 1]
        for sequence in chain(decoding, prefilling):
            if sequence.phase is not Phase.RUNNING or budget == 0:
                continue
            length = min(sequence.num_pending, budget, prompts.left(sequence))
            if length and self._grow_or_preempt(sequence, sequence.num_computed + length):
                chunks.append(Chunk(sequence, length))
                budget -= length
                prompts.take(length)
        chunks += self._admit(budget, prompts)
        return [chunk for chunk in chunks if chunk.sequence.phase is Phase.RUNNING]

    def mark_computed(self, chunks: Iterable[Chunk]) -> None:
        """Note that the keys and values of `chunks` are in their blocks."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.length
            self._blocks.register(sequence.blocks, sequence.chain, sequence.token_ids, sequence.num_computed)

    def mark_produced(self, sequence: Sequence) -> None:
        """Note one more token of output."""
        self.waiting.charge(sequence, output_tokens=1)

    def finish(self, sequence: Sequence) -> None:
        """Take `sequence` out and give back all it holds. The only way out, for every cause."""
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        sequence.phase = Phase.FINISHED

    def release(self, request_id: str) -> None:
        """Give back the lease of a request all of whose sequences have finished."""
        lease = self._groups.pop(request_id).lease
        if lease is not None:
            lease.release()

    def lease_of(self, sequence: Sequence) -> Lease | None:
        """Return the lease that `sequence` runs under; None for the base."""
        return self._groups[sequence.request.id].lease

    def _admit(self, budget: int, prompts: _PromptRoom) -> list[Chunk]:
        chunks: list[Chunk] = []
        if budget == 0 or not self.waiting:
            return chunks
        for sequence in self.waiting.offers():
            if not self._is_ready(sequence) or not prompts.left(sequence):
                continue
            if not self._take_all(sequence):
                break
            length = min(sequence.num_pending, budget, prompts.left(sequence))
            chunks.append(Chunk(sequence, length))
            budget -= length
            prompts.take(length)
            if budget == 0:
                break
        return chunks

    def _is_ready(self, sequence: Sequence) -> bool:
        """Whether its adapter is loaded, and no sibling is computing the prompt just now."""
        group = self._groups[sequence.request.id]
        if group.lease is not None and not group.lease.ready:
            return False
        size = self._blocks.block_size
        shareable = (sequence.num_prompt - 1) // size * size if self._blocks.is_caching else 0
        return not any(
            sibling.phase is Phase.RUNNING and sibling.num_computed < shareable for sibling in group.sequences
        )

    def _take_all(self, sequence: Sequence) -> bool:
        """Admit `sequence` with a place, blocks and a pin on its adapter, or with nothing; others may have to
        make way.
        """
        while len(self.running) >= self._max_num_seqs or not self._take_memory(sequence):
            victim = self.waiting.to_admit(sequence, self.running)
            if victim is None:
                return False
            self._preempt(victim)
        self.waiting.remove(sequence)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        self._count_first_admission(sequence)
        return True

    def _take_memory(self, sequence: Sequence) -> bool:
        """Take blocks for all tokens so far, known ones where there are, and a pin on the adapter."""
        if self._take_blocks_and_pin(sequence, is_reusing=not sequence.wants_every_row):
            return True
        # Known blocks may lie scattered over so much memory that the adapter has no room beside them.
        return not self.running and self._take_blocks_and_pin(sequence, is_reusing=False)

    def _take_blocks_and_pin(self, sequence: Sequence, *, is_reusing: bool) -> bool:
        num_tokens = len(sequence.token_ids)
        if is_reusing:
            sequence.num_computed = self._blocks.attach(sequence.blocks, sequence.chain, sequence.token_ids)
        if self._blocks.can_grow(sequence.blocks, num_tokens) and self._pin(sequence):
            if self._blocks.grow(sequence.blocks, num_tokens):
                return True
            self._unpin(sequence)
        self._drop_blocks(sequence)
        return False

    def _count_first_admission(self, sequence: Sequence) -> None:
        """Charge the prompt, and note how much of it was found; after a preemption this has been done."""
        if sequence.num_cached is not None:
            return
        group = self._groups[sequence.request.id]
        first = next((item.num_cached for item in group.sequences if item.num_cached is not None), None)
        # What a sibling computed was not there when the request came.
        sequence.num_cached = sequence.num_computed if first is None else first
        self.num_prompt_tokens += sequence.num_prompt
        self.num_cached_tokens += sequence.num_computed
        self.waiting.charge(sequence, prompt_tokens=sequence.num_prompt - sequence.num_computed)

    def _grow_or_preempt(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the block table hold `num_tokens`; False where `sequence` itself had to make way."""
        while not self._blocks.grow(sequence.blocks, num_tokens):
            victim = self.waiting.to_grow(self.running)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Put `sequence` back into the queue; what of its tokens is not found in the prefix cache then is
        computed again.
        """
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.put_back(sequence)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self._drop_blocks(sequence)
        self._unpin(sequence)

    def _drop_blocks(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.blocks)
        sequence.chain.reset()
        sequence.num_computed = 0

    def _pin(self, sequence: Sequence) -> bool:
        lease = self.lease_of(sequence)
        if lease is not None:
            sequence.adapter = lease.pin()
        return lease is None or sequence.adapter is not None

    def _unpin(self, sequence: Sequence) -> None:
        lease = self.lease_of(sequence)
        if lease is not None:
            lease.unpin()
            sequence.adapter = None
