"""OpenAI's paging, `after` an id and `limit`, over the services' page tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from services.common.errors import InvalidArgument

UPSTREAM_PAGE_SIZE = 1000


class Paged(Protocol):
    """A request for one page."""

    page_token: str


class PagedAnswer(Protocol):
    """One page."""

    next_page_token: str


ItemT = TypeVar("ItemT")
AskT = TypeVar("AskT", bound=Paged)
AnswerT = TypeVar("AnswerT", bound=PagedAnswer)


@dataclass(frozen=True, slots=True)
class Page(Generic[ItemT]):
    """Some items of a list, and whether more follow."""

    items: list[ItemT]
    has_more: bool

    def object(self, shown: Callable[[ItemT], dict[str, Any]]) -> dict[str, Any]:
        """Return OpenAI's list object of the items as `shown`."""
        data = [shown(item) for item in self.items]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": self.has_more,
        }


async def page_after(
    items: AsyncIterator[ItemT], key: Callable[[ItemT], str], *, after: str | None, limit: int
) -> Page[ItemT]:
    """Return the `limit` items that follow the one with the key `after`, or the first ones when it is None.

    Raises:
        InvalidArgument: `invalid_value`; no item has that key.
    """
    found: list[ItemT] = []
    is_past = after is None
    async for item in items:
        if not is_past:
            is_past = key(item) == after
        elif len(found) == limit:
            return Page(found, has_more=True)
        else:
            found.append(item)
    if not is_past:
        raise InvalidArgument("invalid_value", "after names nothing in this list", field="after", value=after)
    return Page(found, has_more=False)


def page_size(after: str | None, limit: int) -> int:
    """Return how much to ask a service for at once: what is shown and one more, or much for a search."""
    return min(limit + 1, UPSTREAM_PAGE_SIZE) if after is None else UPSTREAM_PAGE_SIZE


async def all_items(
    method: Callable[[AskT], Awaitable[AnswerT]], ask: AskT, items: Callable[[AnswerT], Iterable[ItemT]]
) -> AsyncIterator[ItemT]:
    """Yield every item that a service's paged method lists, page by page as they are needed."""
    while True:
        answer = await method(ask)
        for item in items(answer):
            yield item
        if not answer.next_page_token:
            return
        ask.page_token = answer.next_page_token


async def in_memory(items: Sequence[ItemT]) -> AsyncIterator[ItemT]:
    """Yield the items of a sequence."""
    for item in items:
        yield item
