"""Base models: a name, a fingerprint, and the layers that adapters may target."""

from __future__ import annotations

import dataclasses

from services.common import names
from services.common.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from services.common.fingerprint import BaseFingerprint
from services.registry.catalogue import Catalogue, Mutation
from services.registry.config import RegistryLimits
from services.registry.index import PREFIX
from services.registry.records import BASES, BaseRecord

_BASES = PREFIX + "bases"
_DIGESTS = PREFIX + "base_digests"


class Bases:
    """The registered bases, shared by all tenants."""

    def __init__(self, catalogue: Catalogue, limits: RegistryLimits) -> None:
        self._catalogue = catalogue
        self._limits = limits

    async def create(self, base: BaseRecord) -> BaseRecord:
        """Register `base`, or return the record that is there where its name has the same fingerprint
        already.

        Raises:
            InvalidArgument: `bad_name`, `bad_digest`, `bad_module` or `bad_base_model`.
            ResourceExhausted: `too_large`.
            AlreadyExists: `base_exists`, where the name is bound to another fingerprint.
        """
        self._check(base)
        async with self._catalogue.mutation() as mutation:
            known = await _by_name(mutation, base.name)
            if known is None:
                await mutation.append(base)
                return base
        if known.fingerprint.digest != base.fingerprint.digest:
            raise AlreadyExists(
                "base_exists",
                f"Base {base.name} is registered with another fingerprint ({known.fingerprint.digest}).",
                field="base_model.name",
                value=base.name,
                resource=f"bases/{base.name}",
                final=True,
            )
        return known

    async def by_name(self, name: str) -> BaseRecord:
        """Return the base `name`. Raises `InvalidArgument` (`bad_name`) or `NotFound` (`base_not_found`)."""
        names.base_name(name, field="name")
        found = await _by_name(self._catalogue, name)
        if found is None:
            raise _not_found(name)
        return found

    async def by_digest(self, digest: str) -> BaseRecord:
        """Return the base with that fingerprint. Raises `bad_digest` or `base_not_found`, as `by_name`."""
        names.digest(digest)
        [name] = await self._catalogue.query(("HGET", _DIGESTS, digest))
        found = None if name is None else await _by_name(self._catalogue, name.decode())
        if found is None:
            raise _not_found(digest)
        return found

    async def page(self, after: str, size: int) -> tuple[list[BaseRecord], bool]:
        """Return up to `size` bases by name, after the name `after`, and whether there are more."""
        [found] = await self._catalogue.query(("HGETALL", _BASES))
        wanted = sorted(name for name in found if name.decode() > after)
        return [BASES.decode(found[name]) for name in wanted[:size]], len(wanted) > size

    def _check(self, base: BaseRecord) -> None:
        names.base_name(base.name, field="base_model.name")
        for field in dataclasses.fields(BaseFingerprint):
            value = getattr(base.fingerprint, field.name)
            if isinstance(value, str):
                names.digest(value, field=f"base_model.fingerprint.{field.name}")
        for count in ("hidden_size", "num_layers", "vocab_size", "max_model_len"):
            if getattr(base, count) < 1:
                message = f"{count} must be at least 1."
                raise InvalidArgument(
                    "bad_base_model", message, field=f"base_model.{count}", value=0, limit=1
                )
        if len(base.architecture) > 128 or not base.architecture.isidentifier():
            message = "architecture must be the name of a class."
            raise InvalidArgument("bad_base_model", message, field="base_model.architecture")
        limit = self._limits.max_linear_layers
        if len(base.linear_layers) > limit:
            message = f"A base may list {limit} linear modules."
            raise ResourceExhausted(
                "too_large", message, field="base_model.linear_modules", limit=limit, final=True
            )
        seen: set[str] = set()
        for layer in base.linear_layers:
            is_name = 0 < len(layer.name) <= 256 and layer.name.isascii() and layer.name.isprintable()
            if not is_name or layer.name in seen or layer.in_features < 1 or layer.out_features < 1:
                message = "Every linear module needs a name of its own, and sizes of at least 1."
                raise InvalidArgument(
                    "bad_module", message, field="base_model.linear_modules", value=layer.name
                )
            seen.add(layer.name)


async def _by_name(source: Catalogue | Mutation, name: str) -> BaseRecord | None:
    [found] = await source.query(("HGET", _BASES, name))
    return None if found is None else BASES.decode(found)


def _not_found(key: str) -> NotFound:
    return NotFound("base_not_found", f"No base {key} is registered.", resource=f"bases/{key}")
