"""Fetching adapter files from the registry: on loader threads, resumed after a cut, checked by digest."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import grpc

from lorafleet.registry.v1.adapter_pb2 import DownloadVersionRequest
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceStub
from services.common import status, telemetry
from services.common.errors import Code, DataLoss
from services.common.rpc.tenant import TENANT_KEY
from services.common.tls import PeerTls
from services.common.transport import channel_options
from services.inference.adapters.disk import Fetched
from services.inference.resolver import adapter_unavailable
from services.inference.sources import AdapterSource, AdapterSources, SourceFile
from services.inference.telemetry import fetch_span

_ATTEMPTS_WITHOUT_PROGRESS = 4
_FIRST_PAUSE_SECONDS = 0.1
_UNREACHABLE = frozenset(
    {Code.UNAVAILABLE, Code.ABORTED, Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.CANCELLED}
)
# A stream that a dead or crawling store holds up is begun again this often, from where it was.
_STREAM_SECONDS = 30.0


class RegistryFetcher:
    """The engine's fetcher. Its calls are synchronous, on a channel of its own: loader threads block."""

    def __init__(
        self, target: str, sources: AdapterSources, *, timeout_seconds: float, tls: PeerTls | None = None
    ) -> None:
        """Fetch from the registry at `HOST:PORT`, each version within `timeout_seconds`."""
        self._channel = (
            grpc.insecure_channel(target, options=channel_options())
            if tls is None
            else grpc.secure_channel(target, tls.credentials(), options=channel_options())
        )
        self._adapters = AdapterServiceStub(self._channel)
        self._sources = sources
        self._timeout_seconds = timeout_seconds

    def close(self) -> None:
        """End the downloads under way."""
        self._channel.close()

    def fetch(self, digest: str, into: Path) -> Fetched:
        """Write the version's files to the empty folder `into`, and return their digests and their source.

        Its span links to the publication of the version.

        Raises:
            Unavailable: `adapter_unavailable` where the registry cannot be reached, or not fast enough.
            DataLoss: `corrupt_blob` where the bytes are not those of the version.
            LorafleetError: what the registry says, e.g. `adapter_deleted`.
        """
        source = self._sources.require(digest)
        with fetch_span(source):
            return self._fetch(source, into)

    def _fetch(self, source: AdapterSource, into: Path) -> Fetched:
        deadline = time.monotonic() + self._timeout_seconds
        digests, verify_seconds = {}, 0.0
        for name, file in source.files.items():
            digests[name], seconds = self._fetch_file(source, name, file, into / name, deadline)
            verify_seconds += seconds
        return Fetched(digests, verify_seconds, source.to_json())

    def _fetch_file(
        self, source: AdapterSource, name: str, file: SourceFile, path: Path, deadline: float
    ) -> tuple[str, float]:
        """Return the file's SHA-256 and how long hashing took."""
        digest = hashlib.sha256()
        received = 0
        failures = 0
        verify_seconds = 0.0
        with path.open("xb") as out:
            while received < file.size_bytes:
                before = received
                try:
                    with closing(self._chunks(source, name, received, deadline)) as chunks:
                        for data in chunks:
                            received += len(data)
                            if received > file.size_bytes:
                                raise _mismatch(source, name)
                            started = time.perf_counter()
                            digest.update(data)
                            verify_seconds += time.perf_counter() - started
                            out.write(data)
                    if received < file.size_bytes:
                        raise _mismatch(source, name)
                except grpc.RpcError as error:
                    failures = 1 if received > before else failures + 1
                    self._pause_or_give_up(error, failures, deadline)
        if "sha256:" + digest.hexdigest() != file.digest:
            raise _mismatch(source, name)
        return digest.hexdigest(), verify_seconds

    def _chunks(
        self, source: AdapterSource, name: str, offset: int, deadline: float
    ) -> Generator[bytes, None, None]:
        """Yield the bytes of one file from `offset` on."""
        responses = self._adapters.DownloadVersion(
            DownloadVersionRequest(ref=source.ref, file=name, offset=offset),
            timeout=min(max(0.0, deadline - time.monotonic()), _STREAM_SECONDS),
            metadata=((TENANT_KEY, source.tenant), *telemetry.outgoing_metadata()),
        )
        try:
            for response in responses:
                if response.offset != offset:
                    raise _mismatch(source, name)
                offset += len(response.data)
                yield response.data
        finally:
            responses.cancel()

    def _pause_or_give_up(self, error: grpc.RpcError, failures: int, deadline: float) -> None:
        """Wait before the next attempt, or raise what the failure means."""
        refusal = status.from_rpc_error(error)
        if refusal.code not in _UNREACHABLE:
            raise refusal from error
        # Drawn, so that the loads which one outage stopped do not come back all at once.
        pause_seconds = _FIRST_PAUSE_SECONDS * 2 ** (failures - 1) * random.uniform(0.5, 1.5)  # noqa: S311
        hopeless = failures >= _ATTEMPTS_WITHOUT_PROGRESS or time.monotonic() + pause_seconds >= deadline
        if refusal.code is Code.CANCELLED or hopeless:
            raise adapter_unavailable(refusal) from error
        time.sleep(pause_seconds)


def _mismatch(source: AdapterSource, name: str) -> DataLoss:
    return DataLoss(
        "corrupt_blob",
        f"What the registry sent as {name} of {source.version_ref} does not match its digest.",
        resource=f"adapters/{source.version_ref}",
    )
