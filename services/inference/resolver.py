"""From an adapter reference to the version that answers, once per request, through the registry."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from lorafleet.registry.v1.adapter_pb2 import (
    VERSION_STATE_READY,
    AdapterVersion,
    DeltaKind,
    ResolveVersionRequest,
)
from services.common import status
from services.common.adapter_format import CONFIG_FILE, WEIGHTS_FILE, version_digest
from services.common.call_context import current_tenant
from services.common.errors import Code, DataLoss, FailedPrecondition, LorafleetError, NotFound, Unavailable
from services.common.names import AdapterRef
from services.inference.sources import AdapterSource, AdapterSources, SourceFile

if TYPE_CHECKING:
    from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

_MAX_CACHED = 65536
_RETRY_AFTER_SECONDS = 1.0
_SERVED_KINDS = (
    DeltaKind.DELTA_KIND_LORA,
    DeltaKind.DELTA_KIND_LORA_BIAS,
    DeltaKind.DELTA_KIND_LORA_SCALE,
    DeltaKind.DELTA_KIND_HEAD,
)
_UNREACHABLE = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True)
class ResolverLimits:
    """How long a look-up may take and how old its answer may be.

    Attributes:
        timeout_seconds: for one look-up.
        fresh_seconds: a digest or a version number always means the same version, so its answer is used for
            this long without asking whether that was deleted.
        stale_seconds: while the registry, which alone moves names, cannot be reached, the last answer to any
            reference stands for this long.
    """

    timeout_seconds: float
    fresh_seconds: float
    stale_seconds: float


@dataclass(frozen=True, slots=True)
class _Answer:
    source: AdapterSource
    asked_at: float


class AdapterResolver:
    """Resolves references for the tenant of the present call; belongs to one event loop."""

    def __init__(
        self,
        adapters: AdapterServiceAsyncStub,
        sources: AdapterSources,
        base_fingerprint_digest: str,
        limits: ResolverLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapters = adapters
        self._sources = sources
        self._base_fingerprint_digest = base_fingerprint_digest
        self._limits = limits
        self._clock = clock
        self._answers: OrderedDict[tuple[str, str], _Answer] = OrderedDict()

    async def resolve(self, text: str, *, field: str) -> AdapterSource:
        """Return the version that a reference names now, and note where its bytes are.

        Raises:
            InvalidArgument: `bad_name`, `bad_version`, `bad_alias` or `bad_digest`.
            NotFound: `adapter_not_found`, `version_not_found`, `alias_not_found` or `adapter_deleted`.
            FailedPrecondition: `base_revision_mismatch` where it was trained on other base values,
                `unsupported_adapter_kind`.
            Unavailable: `adapter_unavailable` where the registry cannot be reached.
        """
        ref = AdapterRef.parse(text, field=field)
        key = (current_tenant(), str(ref))
        known = self._answers.get(key)
        asked_at = self._clock()
        age_seconds = math.inf if known is None else asked_at - known.asked_at
        if known is not None and _is_immutable(ref) and age_seconds < self._limits.fresh_seconds:
            return self._noted(known.source)
        try:
            version = await self._adapters.ResolveVersion(
                ResolveVersionRequest(ref=str(ref)), timeout=self._limits.timeout_seconds
            )
        except grpc.aio.AioRpcError as error:
            refusal = status.from_rpc_error(error)
            if refusal.code not in _UNREACHABLE:
                self._answers.pop(key, None)
                raise refusal from error
            if known is not None and age_seconds < self._limits.stale_seconds:
                return self._noted(known.source)
            raise adapter_unavailable(refusal) from error
        source = self._checked(version, ref, field)
        self._answers[key] = _Answer(source, asked_at)
        self._answers.move_to_end(key)
        while len(self._answers) > _MAX_CACHED:
            self._answers.popitem(last=False)
        return self._noted(source)

    async def resolve_here(self, text: str, *, field: str) -> AdapterSource:
        """As `resolve`; where the registry has deleted the version or cannot be reached, what is known here
        of the tenant's version by that number or digest.

        Raises:
            LorafleetError: as `resolve`.
        """
        try:
            return await self.resolve(text, field=field)
        except (NotFound, Unavailable):
            ref = AdapterRef.parse(text, field=field)
            for source in self._sources.of_tenant(current_tenant()).values():
                if _is_immutable(ref) and str(ref) in (source.ref, source.version_ref):
                    return source
            raise

    def _noted(self, source: AdapterSource) -> AdapterSource:
        self._sources.note(source)
        return source

    def _checked(self, version: AdapterVersion, ref: AdapterRef, field: str) -> AdapterSource:
        files = {file.name: SourceFile(file.digest, file.size_bytes) for file in version.files}
        if version.state != VERSION_STATE_READY:
            raise NotFound("adapter_deleted", f"{ref} is deleted.", field=field, value=str(ref))
        if version.base_fingerprint_digest != self._base_fingerprint_digest:
            raise FailedPrecondition(
                "base_revision_mismatch",
                f"{ref} is bound to other base values than those served here.",
                field=field,
                value=version.base_fingerprint_digest,
                limit=self._base_fingerprint_digest,
            )
        if version.format.kind not in _SERVED_KINDS:
            raise FailedPrecondition(
                "unsupported_adapter_kind",
                f"{ref} is of kind {version.format.kind}, which is not served.",
                field=field,
                value=version.format.kind,
                limit=[DeltaKind.Name(kind) for kind in _SERVED_KINDS],
            )
        if set(files) != {CONFIG_FILE, WEIGHTS_FILE} or version.digest != version_digest(
            config_digest=files[CONFIG_FILE].digest,
            weights_digest=files[WEIGHTS_FILE].digest,
            base_digest=version.base_fingerprint_digest,
        ):
            raise DataLoss("corrupt_version", f"The record of {ref} does not match its digest.", field=field)
        return AdapterSource(
            tenant=current_tenant(),
            digest=version.digest,
            ref=f"{version.adapter}@{version.digest}",
            version_ref=f"{version.adapter}:{version.version}",
            max_rank=version.format.max_rank,
            files=files,
            traceparent=version.traceparent,
        )


def adapter_unavailable(cause: LorafleetError) -> Unavailable:
    """Return the error for an adapter that cannot be had now, e.g. because the registry does not answer."""
    return Unavailable(
        "adapter_unavailable",
        f"The adapter cannot be had from the registry now: {cause.message}",
        retry_after_seconds=cause.retry_after_seconds or _RETRY_AFTER_SECONDS,
    )


def _is_immutable(ref: AdapterRef) -> bool:
    return ref.version is not None or ref.digest is not None
