"""The Python client: everything a fleet can do, over gRPC, with types."""

from lorafleet.client.aio import AsyncClient
from lorafleet.client.generation import Chunk, Completion
from lorafleet.client.sync import Client

__all__ = ["AsyncClient", "Chunk", "Client", "Completion"]
