"""Lists that take several pages come whole, in their order."""

from __future__ import annotations

from typing import Any

from lorafleet.client.adapters import AsyncAdapters
from lorafleet.client.connection import Connection
from lorafleet.registry.v1 import adapter_pb2 as messages


async def test_every_page_of_a_history_is_read() -> None:
    asked: list[str] = []

    async def history(
        request: messages.ListAliasHistoryRequest, **_: Any
    ) -> messages.ListAliasHistoryResponse:
        asked.append(request.page_token)
        first = 10 * len(asked)
        return messages.ListAliasHistoryResponse(
            moves=[messages.Alias(version=first - n) for n in range(2)],
            next_page_token=f"after-{len(asked)}" if len(asked) < 3 else "",
        )

    connection = Connection("127.0.0.1:1", "lf-key")
    adapters = AsyncAdapters(connection)
    adapters._stub.ListAliasHistory = history  # type: ignore[assignment]
    moves = await adapters.alias_history("billing", "prod")
    await connection.close()
    assert asked == ["", "after-1", "after-2"]
    assert [move.version for move in moves] == [10, 9, 20, 19, 30, 29]
