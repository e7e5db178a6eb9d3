"""Consistent hashing: keys and replicas on one ring, so that a change of the replicas moves few keys."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence

POINTS_PER_REPLICA = 64


class HashRing:
    """Replicas at `POINTS_PER_REPLICA` points each of a ring of 64-bit hashes (Karger et al. 1997)."""

    def __init__(self, replicas: Sequence[str]) -> None:
        points = sorted(
            (_hash(f"{replica} {number}"), replica)
            for replica in replicas
            for number in range(POINTS_PER_REPLICA)
        )
        self._hashes = [point for point, _ in points]
        self._replicas = [replica for _, replica in points]

    def walk(self, key: str) -> Iterator[str]:
        """Yield each replica once, clockwise from the key; the first is the key's home."""
        seen: set[str] = set()
        count = len(self._replicas)
        start = bisect_left(self._hashes, _hash(key))
        for offset in range(count):
            replica = self._replicas[(start + offset) % count]
            if replica not in seen:
                seen.add(replica)
                yield replica


class Rings:
    """The ring of the present members, built anew when they change."""

    def __init__(self) -> None:
        self._members: Sequence[str] = ()
        self._ring = HashRing(())

    def of(self, members: Sequence[str]) -> HashRing:
        """Return the ring of `members`."""
        if members is not self._members:
            self._members, self._ring = members, HashRing(members)
        return self._ring


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
