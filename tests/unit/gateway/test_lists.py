"""Paging by `after` and `limit`, messages as plain objects, and events on the wire."""

from __future__ import annotations

import json

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.inference.v1.inference_service_pb2 import ResidentAdapter, Tier
from lorafleet.trainer.v1.job_pb2 import Estimate, JobEvent, Progress
from services.common.errors import InvalidArgument
from services.gateway.paging import in_memory, page_after
from services.gateway.plain import plain
from services.gateway.sse import event


@pytest.mark.parametrize(
    ("after", "limit", "items", "has_more"),
    [
        (None, 2, ["e", "d"], True),
        (None, 5, ["e", "d", "c", "b", "a"], False),
        ("d", 2, ["c", "b"], True),
        ("c", 2, ["b", "a"], False),
        ("a", 2, [], False),
    ],
)
async def test_pages(after: str | None, limit: int, items: list[str], has_more: bool) -> None:
    page = await page_after(in_memory("edcba"), str, after=after, limit=limit)
    assert (page.items, page.has_more) == (items, has_more)


async def test_after_nothing_is_an_error() -> None:
    with pytest.raises(InvalidArgument) as caught:
        await page_after(in_memory("edcba"), str, after="z", limit=2)
    assert caught.value.field == "after"


def test_plain_objects() -> None:
    shown = plain(
        ResidentAdapter(
            digest="sha256:1", tier=Tier.TIER_DEVICE, device_bytes=2**40, last_use_time=Timestamp(seconds=9)
        )
    )
    assert (shown["tier"], shown["device_bytes"], shown["last_use_time"]) == ("device", 2**40, 9)
    assert (shown["retry_time"], shown["pinned"]) == (None, False)
    assert plain(Estimate(memory_bytes={"base": 5}))["memory_bytes"] == {"base": 5}
    assert plain(Progress(loss=float("inf")))["loss"] is None
    assert plain(JobEvent())["level"] is None


def test_row_102_line_breaks_of_every_kind_stay_inside_an_event() -> None:
    text = "a\u2028b\u2029c\x00d\r\ne\nf\x85g"
    line = event({"text": text})
    assert line.isascii()
    assert line.count(b"\n") == 2
    assert json.loads(line.removeprefix(b"data: ")) == {"text": text}
