"""Who runs in the next step.

Running sequences go first, one token each while they decode, in order of admission; then unfinished prefills,
in chunks; then waiting sequences, first come first served. A sequence whose adapter is still loading is
passed over; one that lacks blocks or device memory stops admission, so that large requests are not starved by
small ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from services.inference.adapters.cache import Lease
from services.inference.engine.blocks import BlockPool
from services.inference.engine.sequence import Phase, Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`length` pending tokens of `sequence`, to be run in this step."""

    sequence: Sequence
    length: int


class Scheduler:
    """Owns the waiting queue, the running list and the block tables' growth."""

    def __init__(self, blocks: BlockPool, *, max_batch_tokens: int, max_num_seqs: int) -> None:
        assert max_batch_tokens >= max_num_seqs, "every running sequence must be able to decode in each step"
        self._blocks = blocks
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._leases: dict[str, Lease] = {}
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequences: Iterable[Sequence], lease: Lease | None) -> None:
        """Queue the sequences of one request. `lease` is None for the base."""
        for sequence in sequences:
            self.waiting.append(sequence)
            if lease is not None:
                self._leases[sequence.request.id] = lease

    def schedule(self) -> list[Chunk]:
        """Choose this step's chunks and give each its blocks."""
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending > 1]
        for sequence in chain(decoding, prefilling):
            if sequence.phase is not Phase.RUNNING or budget == 0:
                continue
            length = min(sequence.num_pending, budget)
            if self._grow_or_preempt(sequence, sequence.num_computed + length):
                chunks.append(Chunk(sequence, length))
                budget -= length
        chunks = [chunk for chunk in chunks if chunk.sequence.phase is Phase.RUNNING]
        chunks += self._admit(budget)
        return chunks

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
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            lease.release()

    def lease_of(self, sequence: Sequence) -> Lease | None:
        """Return the lease that `sequence` runs under; None for the base."""
        return self._leases.get(sequence.request.id)

    def _admit(self, budget: int) -> list[Chunk]:
        chunks = []
        passed_over: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting.popleft()
            lease = self.lease_of(sequence)
            if lease is not None and not lease.ready:
                passed_over.append(sequence)
                continue
            if not self._take_all(sequence, lease):
                self.waiting.appendleft(sequence)
                break
            length = min(sequence.num_pending, budget)
            chunks.append(Chunk(sequence, length))
            budget -= length
        self.waiting.extendleft(reversed(passed_over))
        return chunks

    def _take_all(self, sequence: Sequence, lease: Lease | None) -> bool:
        """Take blocks for all tokens so far and a pin on the adapter, or nothing."""
        num_tokens = len(sequence.token_ids)
        if not self._blocks.can_grow(sequence.blocks, num_tokens):
            return False
        if lease is not None:
            adapter = lease.pin()
            if adapter is None:
                return False
            sequence.adapter = adapter
        self._blocks.grow(sequence.blocks, num_tokens)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        return True

    def _grow_or_preempt(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make the block table hold `num_tokens`; False where `sequence` itself had to make way."""
        while not self._blocks.can_grow(sequence.blocks, num_tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self._blocks.grow(sequence.blocks, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Put `sequence` back at the head of the queue; its tokens are computed again when it is admitted
        again.
        """
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.blocks)
        lease = self.lease_of(sequence)
        if lease is not None:
            lease.unpin()
            sequence.adapter = None
