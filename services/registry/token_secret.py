"""The secret behind page and resume tokens, kept in the store so that tokens outlive a restart."""

from __future__ import annotations

import contextlib
import secrets

from services.common.store import ObjectExistsError, ObjectNotFoundError, ObjectStore
from services.registry.paging import PageTokens
from services.registry.uninterrupted import in_thread
from services.registry.writer import Writer

_KEY = "secrets/tokens"
_SECRET_BYTES = 32


class TokenSource:
    """Hands out the signer of tokens; the store is read at the first use."""

    def __init__(self, store: ObjectStore, writer: Writer) -> None:
        self._store = store
        self._writer = writer
        self._tokens: PageTokens | None = None

    async def get(self) -> PageTokens:
        """Return the signer. Raises `Unavailable` where the store cannot be reached."""
        if self._tokens is None:
            # Only the one writer may draw the secret.
            await self._writer.hold()
            self._tokens = PageTokens(await in_thread(_secret, self._store))
        return self._tokens


def _secret(store: ObjectStore) -> bytes:
    try:
        return store.get(_KEY)
    except ObjectNotFoundError:
        with contextlib.suppress(ObjectExistsError):
            store.put(_KEY, secrets.token_bytes(_SECRET_BYTES), if_absent=True)
        return store.get(_KEY)
