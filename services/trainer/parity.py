"""The parity gate: what the inference service computes with an adapter must be what the trainer computed.

Before a version is published, its files are published as a candidate, under a tenant of the trainer's own
that no client can name. The inference service is asked for the log-probabilities of probe rows with it, the
largest difference is judged, and the candidate is taken away again. Identity is content, so what was judged
is what the version will be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import grpc
import numpy as np

from lorafleet.inference.v1 import generation_pb2, inference_service_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import adapter_pb2
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.errors import FailedPrecondition, Internal, ResourceExhausted, Unavailable
from services.common.fingerprint import ComputeDtype
from services.common.status import from_rpc_error
from services.common.tls import PeerTls
from services.trainer.config import TrainerSettings
from services.trainer.job import ParityReport

# No client's tenant: keys are made for others.
CANDIDATE_TENANT = "lorafleet-candidates"
PROBE_ROWS = 8
PROBE_TOKENS = 256
PROBE_SECONDS = 120.0
# Float32 differs by the order of its sums. Sixteen bits keep 8 or 11 of a number, through every layer.
TOLERANCE_NATS = {ComputeDtype.FLOAT32: 1e-3, ComputeDtype.FLOAT16: 0.1, ComputeDtype.BFLOAT16: 0.5}

AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class Probe:
    """A row's tokens, and the trainer's log-probability of each but the first, in nats."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def first(self, tokens: int) -> Probe:
        """Return the probe of the first `tokens` tokens."""
        return Probe(self.token_ids[:tokens], self.logprobs[: tokens - 1])


class CandidateRegistry(Protocol):
    """The part of the registry's client that the gate needs."""

    async def publish(
        self,
        folder: Path,
        *,
        adapter: str,
        base_fingerprint_digest: str,
        card: adapter_pb2.ModelCard,
        idempotency_key: str,
    ) -> adapter_pb2.AdapterVersion:
        """Publish the files in `folder`."""
        ...

    async def delete_adapter(self, adapter: str) -> None:
        """Delete an adapter; no error where there is none."""
        ...


class ParityGate:
    """Compares the trainer with one inference service."""

    def __init__(
        self, target: str, registry: CandidateRegistry, tolerance_nats: float, tls: PeerTls | None = None
    ) -> None:
        self._channel = open_channel(target, tls=tls)
        self._inference = InferenceServiceStub(self._channel)
        self._registry = registry
        self._tolerance = tolerance_nats

    @classmethod
    def configured(cls, settings: TrainerSettings, registry: CandidateRegistry) -> Self | None:
        """Return the gate to the inference service of `settings`; None where none is named."""
        if settings.inference_target is None:
            return None
        tolerance = settings.parity_tolerance_nats or TOLERANCE_NATS[settings.base_quantization.compute_dtype]
        return cls(settings.inference_target, registry, tolerance, settings.peer_tls)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def check(
        self,
        folder: Path,
        probes: Sequence[Probe],
        *,
        name: str,
        base_fingerprint_digest: str,
    ) -> ParityReport | None:
        """Return the report on the adapter in `folder`; None where another base is served.

        May be called again after a failure.

        Args:
            name: the candidate's, such as the job's id; nobody else checks under it at the same time.

        Raises:
            Unavailable: a service does not answer just now.
        """
        with call_scope(tenant=CANDIDATE_TENANT, timeout_seconds=PROBE_SECONDS):
            status = await _answered(
                lambda: self._inference.GetStatus(inference_service_pb2.GetStatusRequest())
            )
            if status.base_fingerprint_digest != base_fingerprint_digest:
                return None
            # The service writes one token after the row.
            probes = [probe.first(status.max_model_len - 1) for probe in probes]
            candidate = await self._registry.publish(
                folder,
                adapter=name,
                base_fingerprint_digest=base_fingerprint_digest,
                card=adapter_pb2.ModelCard(description="candidate, before its parity gate"),
                # None: a later attempt would be given the version that this one takes away again.
                idempotency_key="",
            )
            try:
                ref = f"{name}:{candidate.version}"
                served = [await self._logprobs(ref, probe.token_ids) for probe in probes]
            finally:
                await self._registry.delete_adapter(name)
        return compare(probes, served, self._tolerance)

    async def _logprobs(self, ref: str, token_ids: Sequence[int]) -> list[float]:
        """Return what the inference service gives each token but the first, in nats."""
        request = generation_pb2.GenerateRequest(
            model=generation_pb2.ModelRef(adapter=ref),
            tokens=generation_pb2.TokenPrompt(token_ids=token_ids),
            sampling=generation_pb2.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        )

        async def started() -> generation_pb2.Started:
            async for message in self._inference.Generate(request):
                if message.HasField("started"):
                    return message.started
            raise Internal("incomplete_answer", "a generation ended before it started")

        positions = (await _answered(started)).prompt_logprobs
        return [position.chosen.logprob for position in positions]


async def _answered(attempt: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
    try:
        return await attempt()
    except grpc.RpcError as error:
        reason = from_rpc_error(error)
        if isinstance(reason, ResourceExhausted) and not reason.final:
            # A full queue passes; a job that has trained can wait.
            raise Unavailable("inference_busy", reason.message) from error
        raise reason from error


def compare(
    probes: Sequence[Probe], served: Sequence[Sequence[float]], tolerance_nats: float
) -> ParityReport:
    """Return how far the served log-probabilities are from those of the probes."""
    pairs = [
        (ours, theirs)
        for probe, logprobs in zip(probes, served, strict=True)
        for ours, theirs in zip(probe.logprobs, logprobs, strict=True)
    ]
    differences = np.abs(np.subtract(*np.array(pairs, dtype=np.float64).T))
    return ParityReport(
        rows=len(probes),
        tokens=len(pairs),
        max_difference=float(differences.max()),
        mean_difference=float(differences.mean()),
        tolerance=tolerance_nats,
    )


def parity_failed(report: ParityReport) -> FailedPrecondition:
    """Return why a version is not published where the gate does not open."""
    return FailedPrecondition(
        "parity_failed",
        f"served, a token's log-probability differs by {report.max_difference:.4g} nats from training, over "
        f"{report.tokens} tokens of {report.rows} rows; at most {report.tolerance:g} may be",
        field="parity_tolerance_nats",
        value=report.max_difference,
        limit=report.tolerance,
    )
