"""The engine: requests in, token events out, one step at a time.

A plain object for one thread. It knows nothing of servers; a test steps it, or the driver does.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Items

from torch import Tensor

from services.common.errors import AlreadyExists, DeadlineExceeded, Internal, LorafleetError
from services.common.token_bytes import TokenBytes
from services.inference.adapters.cache import AdapterCache
from services.inference.adapters.lease import Lease
from services.inference.adapters.slots import StackCache
from services.inference.engine.batch import Batch, build_batch
from services.inference.engine.blocks import BlockPool
from services.inference.engine.embedding import add_hidden
from services.inference.engine.events import FinishReason, TokenEvent, TokenLogprob
from services.inference.engine.graphs import DecodeGraphs
from services.inference.engine.isolation import Computed, run_isolated
from services.inference.engine.policy import QueuePolicy
from services.inference.engine.request import Request, RequestLimits
from services.inference.engine.runner import Runner
from services.inference.engine.sampler import Sampled, Sampler, score
from services.inference.engine.scheduler import Chunk, Scheduler
from services.inference.engine.sequence import Phase, Sequence
from services.inference.engine.stats import EngineStats
from services.inference.engine.text import TextStream
from services.inference.engine.throughput import Throughput
from services.inference.model.kv import PagedKv
from services.inference.model.loader import BaseModel

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one base model and many adapters."""

    def __init__(
        self,
        base: BaseModel,
        kv: PagedKv,
        blocks: BlockPool,
        policy: QueuePolicy,
        adapters: AdapterCache,
        stacks: StackCache | None,
        limits: RequestLimits,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        graphs: DecodeGraphs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self.adapters = adapters
        self._base = base
        self._kv = kv
        self._stacks = stacks
        self._clock = clock
        self._blocks = blocks
        self._scheduler = Scheduler(
            blocks, policy, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs
        )
        self._eos_token_ids = base.eos_token_ids
        self._token_text = TokenBytes(base.tokenizer.backend_tokenizer, special_tokens_have_text=False)
        self._runner = Runner(base, graphs)
        self._sampler = Sampler(base.eos_token_ids)
        self._live: dict[str, list[Sequence]] = {}
        self._stats = EngineStats()
        self._throughput = Throughput()
        self._max_batch_tokens = max_batch_tokens
        self._faults_in_a_row = 0

    @property
    def faults_in_a_row(self) -> int:
        """Steps of late of which nothing succeeded."""
        return self._faults_in_a_row

    @property
    def has_work(self) -> bool:
        """Whether any request is alive."""
        return bool(self._live)

    @property
    def can_progress(self) -> bool:
        """Whether a step would do anything: something runs, or a waiting request's adapter is ready or has
        failed.
        """
        return bool(self._scheduler.running) or any(
            lease is None or lease.ready or lease.error is not None
            for lease in map(self._scheduler.lease_of, self._scheduler.waiting)
        )

    def add(self, request: Request) -> None:
        """Queue a request and start the load of its adapter.

        Raises:
            InvalidArgument: it can never be served (see `RequestLimits.check`).
            AlreadyExists: `request_exists`.
            LorafleetError: its adapter failed to load a moment ago.
        """
        self.limits.check(request)
        if request.id in self._live:
            raise AlreadyExists("request_exists", f"Request {request.id} is already running.", field="id")
        lease = None if request.adapter_digest is None else self.adapters.acquire(request.adapter_digest)
        sequences = [self._new_sequence(request, index) for index in range(request.sampling.n)]
        if not self._live:
            self._throughput.began(self._clock())
        self._live[request.id] = sequences
        self._scheduler.add(sequences, lease)
        self._stats.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> bool:
        """End a request and free all it holds, without further events. False if it is not alive."""
        if request_id not in self._live:
            return False
        for sequence in list(self._live[request_id]):
            self._finish(sequence)
        return True

    def fail_all(self, error: LorafleetError) -> list[TokenEvent]:
        """End every request with `error`."""
        return [
            self._failed(sequence, error) for group in list(self._live.values()) for sequence in list(group)
        ]

    def fail_running(self, error: LorafleetError) -> list[TokenEvent]:
        """End every sequence that holds device memory with `error`; those that wait go on waiting."""
        return [self._failed(sequence, error) for sequence in list(self._scheduler.running)]

    def step(self) -> list[TokenEvent]:
        """Do one step for every sequence that can run, and return what it produced.

        Raises:
            DeviceLost: nothing can be computed any more.
        """
        started = time.monotonic()
        events = self._end_hopeless()
        chunks = self._scheduler.schedule()
        if chunks:
            self._note_waits(chunks)
            outcome = run_isolated(chunks, self._run, self._runner.recover)
            for computed in outcome.computed:
                self._scheduler.mark_computed(computed.batch.chunks)
                self._collect_prompt_logprobs(computed.batch, computed.logits)
                add_hidden(computed.batch, computed.hidden)
                events += self._choose_tokens(computed.batch, computed.logits)
            events += [self._failed(chunk.sequence, _step_failed(error)) for chunk, error in outcome.failed]
            self._faults_in_a_row = 0 if outcome.computed else self._faults_in_a_row + 1
            self._measure(sum(chunk.length for chunk in chunks), time.monotonic() - started)
        return events

    def stats(self) -> EngineStats:
        """Return a copy of the counters and gauges."""
        stats = self._stats
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            waiting_for_adapter=sum(
                lease is not None and not lease.ready
                for lease in map(self._scheduler.lease_of, self._scheduler.waiting)
            ),
            kv_block_bytes=self._kv.shape.block_bytes,
            kv_blocks_total=self._blocks.num_blocks,
            kv_blocks_free=self._blocks.num_free + self._blocks.num_idle,
            kv_blocks_cached=self._blocks.num_idle,
            steps=stats.steps,
            prompt_tokens=stats.prompt_tokens,
            completion_tokens=stats.completion_tokens,
            preemptions=self._scheduler.num_preemptions,
            prefix_query_tokens=self._scheduler.num_prompt_tokens,
            prefix_hit_tokens=self._scheduler.num_cached_tokens,
            step_seconds=stats.step_seconds,
            seconds_per_request=self._throughput.seconds_per_request(self._clock()),
        )

    def _run(self, chunks: Items[Chunk]) -> Computed:
        batch = build_batch(chunks, self._kv, self._stacks, self._base.device)
        logits, hidden = self._runner.run(batch)
        return Computed(batch, logits, hidden)

    def _measure(self, num_tokens: int, step_seconds: float) -> None:
        self._stats.steps += 1
        self._stats.step_seconds += step_seconds
        self._throughput.stepped(num_tokens, step_seconds)
        self._blocks.seconds_per_token = self._throughput.seconds_per_token

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        sampling = request.sampling
        return Sequence(
            request=request,
            index=index,
            seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
            max_tokens=self.limits.max_tokens(request),
            text=TextStream(self._token_text, request.prompt_token_ids, sampling.stop),
            token_ids=list(request.prompt_token_ids),
            queued_at=self._clock(),
            constraint=None if request.constraint is None else request.constraint.start(),
        )

    def _end_hopeless(self) -> list[TokenEvent]:
        """End the sequences that cannot be done in time or whose adapter cannot be loaded."""
        now = self._clock()
        sequences = [*self._scheduler.running, *self._scheduler.waiting]
        hopeless = [(sequence, self._why_hopeless(sequence, now)) for sequence in sequences]
        return [self._failed(sequence, error) for sequence, error in hopeless if error is not None]

    def _why_hopeless(self, sequence: Sequence, now: float) -> LorafleetError | None:
        lease: Lease | None = self._scheduler.lease_of(sequence)
        if lease is not None and lease.error is not None:
            return lease.error
        deadline = sequence.request.deadline_seconds
        if deadline is None:
            return None
        if now >= deadline:
            return DeadlineExceeded("deadline_exceeded", "The request's deadline passed before it was done.")
        if sequence.phase is Phase.WAITING and now + self._least_seconds(sequence) > deadline:
            return DeadlineExceeded(
                "deadline_unreachable",
                "Computing the prompt takes longer than the time left before the request's deadline.",
            )
        return None

    def _least_seconds(self, sequence: Sequence) -> float:
        """Return the least time to the next token of a waiting sequence, as far as is known."""
        known = self._blocks.count_known(sequence.chain, sequence.token_ids)
        return self._throughput.least_seconds(len(sequence.token_ids) - known, self._max_batch_tokens)

    def _note_waits(self, chunks: list[Chunk]) -> None:
        now = self._clock()
        for chunk in chunks:
            if chunk.sequence.queue_seconds is None:
                chunk.sequence.queue_seconds = now - chunk.sequence.queued_at

    def _collect_prompt_logprobs(self, batch: Batch, logits: Tensor) -> None:
        for span in batch.logit_spans:
            sequence = span.sequence
            if not sequence.wants_prompt_logprobs:
                continue
            # After a preemption the prompt is run again; what has been collected is skipped.
            first = len(sequence.prompt_logprobs)
            last = min(span.position + span.end - span.start, sequence.num_prompt - 1)
            if span.position <= first < last:
                rows = logits[span.start + first - span.position : span.start + last - span.position]
                targets = sequence.request.prompt_token_ids[first + 1 : last + 1]
                sequence.prompt_logprobs += score(rows, targets, sequence.sampling.prompt_logprobs or 0)

    def _choose_tokens(self, batch: Batch, logits: Tensor) -> list[TokenEvent]:
        spans = [span for span in batch.logit_spans if span.samples]
        events = [self._scored(span.sequence) for span in spans if span.sequence.max_tokens == 0]
        spans = [span for span in spans if span.sequence.max_tokens > 0]
        if spans:
            sequences = [span.sequence for span in spans]
            sampled = self._sampler.sample(logits[[span.end - 1 for span in spans]], sequences)
            events += [
                self._advance(sequence, choice) for sequence, choice in zip(sequences, sampled, strict=True)
            ]
        return events

    def _advance(self, sequence: Sequence, choice: Sampled) -> TokenEvent:
        """Add the chosen token to its sequence and say what that means."""
        if choice.error is not None:
            return self._failed(sequence, choice.error)
        first = sequence.num_output == 0
        sequence.append(choice.token_id)
        self._scheduler.mark_produced(sequence)
        self._stats.completion_tokens += 1
        try:
            text, reason, cause = self._read(sequence, choice.token_id)
        except LorafleetError as error:
            return self._failed(sequence, error)
        except Exception as error:  # One request's text must not end the others' step.
            logger.exception("decoding the text of request %s failed", sequence.request.id)
            failure = Internal(
                "detokenization_failed", f"The text could not be decoded: {type(error).__name__}."
            )
            return self._failed(sequence, failure)
        event = TokenEvent(
            request_id=sequence.request.id,
            index=sequence.index,
            token_ids=(choice.token_id,),
            text=text,
            logprobs=() if choice.logprob is None else (choice.logprob,),
            prompt_logprobs=_prompt_logprobs(sequence) if first else None,
            finish_reason=reason,
            stop_cause=cause,
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_output,
            cached_tokens=sequence.num_cached or 0,
            queue_seconds=sequence.queue_seconds or 0.0,
        )
        if reason is not None:
            self._finish(sequence)
        return event

    def _read(self, sequence: Sequence, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Return the new certain text, and whether and why the sequence ends."""
        sampling = sequence.sampling
        if sequence.constraint is not None:
            sequence.constraint.accept(token_id)
        may_stop = sequence.num_output >= sampling.min_tokens
        is_eos = token_id in self._eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            text, stop = sequence.text.flush()
            return text, FinishReason.STOP, token_id if stop is None else stop
        text, stop = sequence.text.push(token_id, look_for_stops=may_stop)
        is_complete = sequence.constraint is not None and sequence.constraint.is_complete
        if stop is None and (is_complete or sequence.num_output >= sequence.max_tokens):
            rest, stop = sequence.text.flush(is_cut=not is_complete)
            text += rest
            if stop is None:
                return text, FinishReason.STOP if is_complete else FinishReason.LENGTH, None
        return text, None if stop is None else FinishReason.STOP, stop

    def _scored(self, sequence: Sequence) -> TokenEvent:
        """End a sequence that only wanted its prompt scored or embedded."""
        self._finish(sequence)
        return TokenEvent(
            request_id=sequence.request.id,
            index=sequence.index,
            prompt_logprobs=_prompt_logprobs(sequence),
            embedding=_embedding(sequence),
            finish_reason=FinishReason.LENGTH,
            prompt_tokens=sequence.num_prompt,
            queue_seconds=sequence.queue_seconds or 0.0,
        )

    def _failed(self, sequence: Sequence, error: LorafleetError) -> TokenEvent:
        self._finish(sequence)
        return TokenEvent(
            request_id=sequence.request.id,
            index=sequence.index,
            finish_reason=FinishReason.ERROR,
            error=error,
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_output,
        )

    def _finish(self, sequence: Sequence) -> None:
        """Free the sequence's blocks and pin, and with the request's last sequence its lease. The only way
        out.
        """
        assert sequence.phase is not Phase.FINISHED
        self._scheduler.finish(sequence)
        request_id = sequence.request.id
        alive = self._live[request_id]
        alive.remove(sequence)
        if not alive:
            del self._live[request_id]
            self._scheduler.release(request_id)
            self._throughput.finished(self._clock())


def _step_failed(error: Exception) -> LorafleetError:
    return Internal("engine_step_failed", f"The engine's step failed: {type(error).__name__}.")


def _prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprob, ...] | None:
    wanted = sequence.sampling.prompt_logprobs is not None and sequence.index == 0
    return tuple(sequence.prompt_logprobs) if wanted else None


def _embedding(sequence: Sequence) -> tuple[float, ...] | None:
    if sequence.hidden_sum is None:
        return None
    assert sequence.num_hidden == sequence.num_prompt
    return tuple((sequence.hidden_sum / sequence.num_hidden).tolist())
