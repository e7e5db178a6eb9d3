"""Aliases: names that point to a version, moved by compare-and-set, with every move kept."""

from __future__ import annotations

from services.common import names
from services.common.errors import Aborted, FailedPrecondition, NotFound
from services.registry.catalogue import Catalogue, Mutation
from services.registry.clock import now_ms
from services.registry.index import adapter_key, tenant_key
from services.registry.lookup import Lookup, adapter_not_found, alias_not_found, version_not_found
from services.registry.records import ALIAS_MOVES, AliasMove


class Aliases:
    """The aliases of all tenants; each call acts for one."""

    def __init__(self, catalogue: Catalogue, lookup: Lookup) -> None:
        self._catalogue = catalogue
        self._lookup = lookup

    async def set(
        self, tenant: str, adapter: str, alias: str, version: int, *, expected_generation: int | None
    ) -> AliasMove:
        """Point `alias` to `version`.

        Args:
            tenant, adapter, alias, version: what to move where.
            expected_generation: move only from this generation; 0: only where the alias does not exist.

        Raises:
            InvalidArgument: `bad_name` or `bad_alias`.
            NotFound: `adapter_not_found`, `version_not_found` or `adapter_deleted`.
            Aborted: `alias_conflict`.
        """
        names.adapter_name(adapter)
        names.alias_name(alias)
        async with self._catalogue.mutation() as mutation:
            last = await self._last_move(mutation, tenant, adapter, alias)
            _check_generation(adapter, alias, last, expected_generation)
            return await self._move(mutation, tenant, adapter, alias, version, last)

    async def rollback(
        self, tenant: str, adapter: str, alias: str, *, expected_generation: int | None
    ) -> AliasMove:
        """Point `alias` to where it pointed before its last move.

        Raises:
            NotFound: `alias_not_found`; also as `set`.
            FailedPrecondition: `no_previous_version`.
            Aborted: `alias_conflict`.
        """
        names.adapter_name(adapter)
        names.alias_name(alias)
        async with self._catalogue.mutation() as mutation:
            last = await self._existing(mutation, tenant, adapter, alias)
            _check_generation(adapter, alias, last, expected_generation)
            [found] = await mutation.query(
                ("ZREVRANGE", adapter_key(tenant, adapter, f"moves:{alias}"), 1, 1)
            )
            previous = ALIAS_MOVES.decode(found[0]) if found else None
            if previous is None or previous.is_deletion:
                message = f"Alias {alias} of {adapter} has pointed to nothing before."
                raise FailedPrecondition(
                    "no_previous_version", message, resource=f"adapters/{adapter}@{alias}"
                )
            return await self._move(mutation, tenant, adapter, alias, previous.version, last)

    async def delete(self, tenant: str, adapter: str, alias: str) -> None:
        """Make `alias` point nowhere. Raises `alias_not_found`; also as `set`."""
        names.adapter_name(adapter)
        names.alias_name(alias)
        async with self._catalogue.mutation() as mutation:
            last = await self._existing(mutation, tenant, adapter, alias)
            await mutation.append(AliasMove(tenant, adapter, alias, last.generation + 1, 0, "", now_ms()))

    async def current(self, tenant: str, adapter: str) -> list[AliasMove]:
        """Return where the aliases of `adapter` point, by name; of all the tenant's adapters where it is
        empty.

        Raises:
            InvalidArgument: `bad_name`.
            NotFound: `adapter_not_found`.
        """
        if adapter:
            return list((await self._lookup.overview(tenant, adapter)).aliases)
        [found] = await self._catalogue.query(("ZRANGE", tenant_key(tenant, "adapters"), 0, -1))
        hashes = await self._catalogue.query(
            *(("HVALS", adapter_key(tenant, name.decode(), "aliases")) for name in found)
        )
        moves = [ALIAS_MOVES.decode(move) for values in hashes for move in values]
        return sorted(
            (move for move in moves if not move.is_deletion), key=lambda move: (move.adapter, move.alias)
        )

    async def history(
        self, tenant: str, adapter: str, alias: str, before: int | None, size: int
    ) -> tuple[list[AliasMove], bool]:
        """Return up to `size` moves, newest first, before a generation, and whether there are more.

        Raises:
            InvalidArgument: `bad_name` or `bad_alias`.
            NotFound: `adapter_not_found` or `alias_not_found`.
        """
        names.adapter_name(adapter)
        names.alias_name(alias)
        newest = "+inf" if before is None else f"({before}"
        [created, exists, found] = await self._catalogue.query(
            ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
            ("HEXISTS", adapter_key(tenant, adapter, "aliases"), alias),
            ("ZREVRANGEBYSCORE", adapter_key(tenant, adapter, f"moves:{alias}"), newest, "-inf",
             "LIMIT", 0, size + 1),
        )  # fmt: skip
        if created is None:
            raise adapter_not_found(adapter)
        if not exists:
            raise alias_not_found(adapter, alias)
        return [ALIAS_MOVES.decode(move) for move in found[:size]], len(found) > size

    async def _move(
        self,
        mutation: Mutation,
        tenant: str,
        adapter: str,
        alias: str,
        version: int,
        last: AliasMove | None,
    ) -> AliasMove:
        target = await self._lookup.version(mutation, tenant, adapter, version)
        if target is None:
            raise version_not_found(adapter, version)
        if target.delete_time_ms is not None:
            message = f"Version {version} of {adapter} was deleted."
            raise NotFound("adapter_deleted", message, resource=f"adapters/{adapter}:{version}")
        generation = 1 if last is None else last.generation + 1
        move = AliasMove(tenant, adapter, alias, generation, version, target.record.digest, now_ms())
        await mutation.append(move)
        return move

    async def _last_move(self, mutation: Mutation, tenant: str, adapter: str, alias: str) -> AliasMove | None:
        [created, found] = await mutation.query(
            ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
            ("HGET", adapter_key(tenant, adapter, "aliases"), alias),
        )
        if created is None:
            raise adapter_not_found(adapter)
        return None if found is None else ALIAS_MOVES.decode(found)

    async def _existing(self, mutation: Mutation, tenant: str, adapter: str, alias: str) -> AliasMove:
        last = await self._last_move(mutation, tenant, adapter, alias)
        if last is None or last.is_deletion:
            raise alias_not_found(adapter, alias)
        return last


def _check_generation(adapter: str, alias: str, last: AliasMove | None, expected: int | None) -> None:
    if expected is None:
        return
    current = 0 if last is None or last.is_deletion else last.generation
    if expected != current:
        raise Aborted(
            "alias_conflict",
            f"Alias {alias} of {adapter} is at generation {current}, not {expected}.",
            field="expected_generation",
            value=expected,
            limit=current,
            resource=f"adapters/{adapter}@{alias}",
            final=True,
            metadata={"generation": str(current)},
        )
