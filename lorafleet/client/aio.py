"""The asyncio client."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from lorafleet.client.adapters import AsyncAdapters
from lorafleet.client.connection import Connection
from lorafleet.client.generation import AsyncInference
from lorafleet.client.jobs import AsyncJobs
from lorafleet.client.target import where


class AsyncClient:
    """A fleet as one API key sees it.

    Attributes:
        adapters: publish, fetch and name adapter versions.
        jobs: fine-tune.
        inference: ask the base and its adapters.
    """

    def __init__(
        self, target: str | None = None, api_key: str | None = None, *, ca_file: Path | None = None
    ) -> None:
        """Connect lazily, on the running event loop.

        Args:
            target: `HOST:PORT` of the gateway's gRPC door; None: $LORAFLEET_GRPC_TARGET, else the fleet of
                this machine.
            api_key: None: $LORAFLEET_API_KEY, else that fleet's first key.
            ca_file: authorities to trust, PEM; the connection is in plain text without.

        Raises:
            FailedPrecondition: `no_fleet`, where nothing says which fleet is meant.
        """
        self._connection = Connection(*where(target, api_key), ca_file=ca_file)
        self.adapters = AsyncAdapters(self._connection)
        self.jobs = AsyncJobs(self._connection)
        self.inference = AsyncInference(self._connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()
