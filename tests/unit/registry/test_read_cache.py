"""Answers for the time that the index is away: right or forgotten, and never too many."""

from __future__ import annotations

from services.registry.index import Command, adapter_key, commands_for
from services.registry.read_cache import MAX_ANSWER_BYTES, ReadCache
from services.registry.records import AliasMove

NEWEST: Command = ("ZREVRANGE", adapter_key("acme", "a", "live"), 0, 0)
PROD: Command = ("HGET", adapter_key("acme", "a", "aliases"), "prod")
OTHER: Command = ("HGET", adapter_key("other", "a", "aliases"), "prod")


def test_a_write_forgets_what_came_from_its_keys_and_nothing_else() -> None:
    cache = ReadCache()
    cache.keep([NEWEST], [[b"1"]])
    cache.keep([NEWEST, PROD], [[b"1"], b"move"])
    cache.keep([OTHER], [b"move"])
    cache.overwritten(commands_for(AliasMove("acme", "a", "prod", 2, 1, "sha256:" + "0" * 64, 1)))
    assert cache.find([NEWEST]) == [[b"1"]]
    assert cache.find([NEWEST, PROD]) is None
    assert cache.find([OTHER]) == [b"move"]


def test_the_longest_unused_goes_when_the_room_ends() -> None:
    cache = ReadCache(max_bytes=10_000)
    for number in range(3):
        cache.keep([("GET", f"k{number}")], [bytes(1500)])
    cache.keep([("GET", "k0")], [bytes(1500)])
    cache.keep([("GET", "k3")], [bytes(1500)])
    cache.keep([("GET", "k4")], [bytes(1500)])
    kept = [number for number in range(5) if cache.find([("GET", f"k{number}")]) is not None]
    assert kept == [0, 3, 4]


def test_an_answer_too_large_is_not_kept() -> None:
    cache = ReadCache()
    cache.keep([NEWEST], [{b"f": bytes(MAX_ANSWER_BYTES)}])
    assert cache.find([NEWEST]) is None


def test_clear_forgets_everything() -> None:
    cache = ReadCache()
    cache.keep([NEWEST], [[]])
    cache.clear()
    assert cache.find([NEWEST]) is None
    cache.keep([NEWEST], [[b"2"]])
    assert cache.find([NEWEST]) == [[b"2"]]
