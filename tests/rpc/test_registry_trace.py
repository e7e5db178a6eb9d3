"""A version remembers the trace that published it: for good, and the first time only."""

from __future__ import annotations

from services.common import telemetry
from tests.support.registry import Client, Place, Upload, registry_client
from tests.support.registry_fixtures import client, flush, local

__all__ = ["client", "local"]

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
OTHER_ID = "1bf7651916cd43dd8448eb211c80319c"


def caller(trace_id: str) -> str:
    return f"00-{trace_id}-b7ad6b7169203331-01"


async def test_a_version_carries_the_trace_of_its_publication(client: Client) -> None:
    with telemetry.child_of(caller(TRACE_ID)):
        published = await client.publish(Upload.made(), key="job-1")
    assert published.traceparent.split("-")[1] == TRACE_ID
    with telemetry.child_of(caller(OTHER_ID)):
        again = await client.publish(Upload.made(), key="job-1")
        resolved = await client.resolve("billing:1")
    assert again.traceparent == resolved.traceparent == published.traceparent


async def test_the_trace_outlives_the_index(local: Place) -> None:
    async with registry_client(local) as client:
        with telemetry.child_of(caller(TRACE_ID)):
            published = await client.publish(Upload.made())
    await flush(local)
    async with registry_client(local) as client:
        assert (await client.resolve("billing:1")).traceparent == published.traceparent
