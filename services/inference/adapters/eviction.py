"""Which adapters make room for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may go.

    Attributes:
        demand: recent requests, decayed.
        reload_cost: what it takes to have it back, in any unit that all candidates share.
        last_use_at: seconds on the cache's clock.
    """

    digest: str
    size_bytes: int
    demand: float
    reload_cost: float
    last_use_at: float


Worth = Callable[[Candidate], float]


def reload_cost_per_byte(candidate: Candidate) -> float:
    """Return demand x reload cost / bytes: what keeping one byte is likely to save.

    GreedyDual-Size with frequency (Cao and Irani 1997; Cherkasova 1998) with a decaying count in place of its
    inflation value, so that what was popular once does not stay for ever.
    """
    return candidate.demand * candidate.reload_cost / max(candidate.size_bytes, 1)


def last_use(candidate: Candidate) -> float:
    """Return when it was last used: least recently used goes first. The plain twin."""
    return candidate.last_use_at


def choose_victims(
    candidates: Iterable[Candidate], needed_bytes: int, worth: Worth = reload_cost_per_byte
) -> list[str] | None:
    """Return the digests to evict, those of least worth first, to free `needed_bytes`; None where all
    together are too small.
    """
    if needed_bytes <= 0:
        return []
    victims = []
    for candidate in sorted(candidates, key=worth):
        victims.append(candidate.digest)
        needed_bytes -= candidate.size_bytes
        if needed_bytes <= 0:
            return victims
    return None
