"""API keys: made, checked, revoked; what is stored is no key."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import InvalidArgument, NotFound, Unauthenticated
from services.common.store import DirectoryStore
from services.gateway.keys import KeyRing, Scope


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def ring(store: DirectoryStore, *, pepper: str = "pepper of the tests", cache_seconds: float = 0) -> KeyRing:
    return KeyRing(store, pepper, cache_seconds)


async def test_a_key_names_its_tenant_and_scopes(store: DirectoryStore) -> None:
    key = ring(store).create("acme", [Scope.FILES])
    principal = await ring(store).authenticate(key)
    assert (principal.tenant, principal.scopes) == ("acme", frozenset({Scope.FILES}))
    assert key.startswith(f"lf-{principal.key_id}-")


async def test_row_93_every_bad_key_fails_alike(store: DirectoryStore) -> None:
    keys = ring(store)
    good, other = keys.create("acme"), keys.create("acme")
    expired = keys.create("acme", lifetime_seconds=0)
    revoked = keys.create("acme")
    keys.revoke(revoked.split("-")[1])
    good_id, other_secret = good.split("-")[1], other.split("-", 2)[2]
    unknown = "lf-" + "a" * 16 + "-" + other_secret
    bad = [None, "", "lf-", good[:-1], good + "x", f"lf-{good_id}-{other_secret}", unknown, expired, revoked]
    bodies = set()
    for key in bad:
        with pytest.raises(Unauthenticated) as caught:
            await keys.authenticate(key)
        bodies.add((caught.value.reason, caught.value.message, caught.value.field))
    assert len(bodies) == 1
    assert (await keys.authenticate(good)).tenant == "acme"


async def test_another_pepper_knows_no_key(store: DirectoryStore) -> None:
    key = ring(store).create("acme")
    with pytest.raises(Unauthenticated):
        await ring(store, pepper="another one").authenticate(key)


def test_the_store_never_sees_the_key(store: DirectoryStore, tmp_path: Path) -> None:
    key = ring(store).create("acme")
    secret = key.split("-", 2)[2]
    stored = [path.read_text() for path in (tmp_path / "store").rglob("*.json")]
    assert len(stored) == 1
    assert secret not in stored[0]


async def test_the_cache_spares_the_store_and_ends(store: DirectoryStore) -> None:
    caching = ring(store, cache_seconds=60)
    key, other = caching.create("acme"), caching.create("acme")
    await caching.authenticate(key)
    await caching.authenticate(other)
    ring(store).revoke(key.split("-")[1])
    assert (await caching.authenticate(key)).tenant == "acme", "known for cache_seconds"
    with pytest.raises(Unauthenticated):
        await ring(store, cache_seconds=0).authenticate(key)
    caching.revoke(other.split("-")[1])
    with pytest.raises(Unauthenticated):
        await caching.authenticate(other)


def test_revoking_twice_or_nothing(store: DirectoryStore) -> None:
    keys = ring(store)
    key_id = keys.create("acme").split("-")[1]
    keys.revoke(key_id)
    for absent in (key_id, "a" * 16, "../keys", ""):
        with pytest.raises(NotFound):
            keys.revoke(absent)


def test_a_tenant_must_be_a_name(store: DirectoryStore) -> None:
    with pytest.raises(InvalidArgument, match="bad_tenant"):
        ring(store).create("No Tenant")
