"""Row 142: the way between the gateway and inference falls silent, both ways or one, and comes back."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import httpx
import pytest

from services.common import transport
from services.common.channels import open_channel
from services.common.transport import KEEPALIVE, MIN_PING_INTERVAL_SECONDS, KeepAlive
from tests.support.fake_base import BASE
from tests.support.gateway import running_gateway
from tests.support.tcp_proxy import tcp_proxy

QUICK = KeepAlive(interval_seconds=1.0, timeout_seconds=0.5)
WAIT_SECONDS = 20.0


async def complete(http: httpx.AsyncClient) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 2})


async def until_served(http: httpx.AsyncClient) -> None:
    while (await complete(http)).status_code != 200:  # noqa: ASYNC110 - nothing tells when it is
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("is_one_way", [False, True], ids=["both ways", "answers only"])
async def test_row_142_a_partition_is_told_and_heals(
    tmp_path: Path, is_one_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The times that find a dead connection, shortened together.
    shortening = QUICK.interval_seconds / KEEPALIVE.interval_seconds
    monkeypatch.setattr(transport, "MIN_PING_INTERVAL_SECONDS", MIN_PING_INTERVAL_SECONDS * shortening)
    monkeypatch.setattr("services.gateway.upstream.open_channel", partial(open_channel, keepalive=QUICK))
    with running_gateway(tmp_path / "behind") as behind:
        async with tcp_proxy(behind.targets["inference"]) as proxy:
            with running_gateway(tmp_path / "gateway", inference_target=proxy.address) as gateway:
                headers = {"authorization": f"Bearer {gateway.key}"}
                async with httpx.AsyncClient(
                    base_url=gateway.url, headers=headers, timeout=WAIT_SECONDS
                ) as http:
                    assert (await complete(http)).status_code == 200
                    if is_one_way:
                        proxy.to_client.clear()
                    else:
                        proxy.cut()
                    # Those under way when it happens wait for the keepalive; nobody waits for ever.
                    caught = await asyncio.gather(*(complete(http) for _ in range(4)))
                    assert {answer.status_code for answer in caught} == {503}
                    # From then on the refusal needs no answer of the peer.
                    for _ in range(5):
                        refused = await complete(http)
                        assert refused.status_code == 503
                        assert refused.json()["error"]["code"] == "unavailable"
                        assert refused.elapsed.total_seconds() < WAIT_SECONDS / 2
                        assert float(refused.headers["retry-after"]) > 0
                    proxy.mend()
                    await asyncio.wait_for(until_served(http), WAIT_SECONDS)
                    answers = await asyncio.gather(*(complete(http) for _ in range(8)))
                    assert {answer.status_code for answer in answers} == {200}
