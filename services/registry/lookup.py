"""Looking adapters and versions up: by name, number, alias or digest, alone or in pages."""

from __future__ import annotations

from dataclasses import dataclass

from services.common import names
from services.common.errors import NotFound
from services.common.names import AdapterRef
from services.registry.catalogue import Catalogue, Mutation
from services.registry.index import Command, adapter_key, tenant_key
from services.registry.records import ALIAS_MOVES, VERSIONS, AliasMove, VersionRecord


@dataclass(frozen=True, slots=True)
class Version:
    """A version as it stands now: its record, when it was deleted, and the aliases that point to it."""

    record: VersionRecord
    delete_time_ms: int | None
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterOverview:
    """An adapter as it stands now. `num_versions` counts those that are not deleted."""

    name: str
    latest: Version | None
    num_versions: int
    aliases: tuple[AliasMove, ...]
    create_time_ms: int


class Lookup:
    """The adapters of all tenants; each call acts for one, and sees nothing of the others."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def resolve(self, tenant: str, ref: AdapterRef) -> Version:
        """Return the version that `ref` names now, never a deleted one.

        Raises:
            NotFound: `adapter_not_found`, `version_not_found`, `alias_not_found` or `adapter_deleted`.
        """
        number = await self._number(tenant, ref)
        found = None if number is None else await self.version(self._catalogue, tenant, ref.name, number)
        if found is None:
            raise NotFound(
                "version_not_found", f"Adapter {ref.name} has no version {ref}.", resource=f"adapters/{ref}"
            )
        if found.delete_time_ms is not None:
            raise _deleted(str(ref))
        return found

    async def overview(self, tenant: str, adapter: str) -> AdapterOverview:
        """Return one adapter. Raises `InvalidArgument` (`bad_name`) or `NotFound` (`adapter_not_found`)."""
        names.adapter_name(adapter)
        [found] = await self._overviews(tenant, [adapter])
        if found is None:
            raise adapter_not_found(adapter)
        return found

    async def page(
        self, tenant: str, after: str, size: int, name_contains: str
    ) -> tuple[list[AdapterOverview], bool]:
        """Return up to `size` adapters by name, after the name `after`, and whether there are more."""
        [found] = await self._catalogue.query(
            ("ZRANGEBYLEX", tenant_key(tenant, "adapters"), f"({after}" if after else "-", "+")
        )
        wanted = [name.decode() for name in found if name_contains in name.decode()]
        overviews = await self._overviews(tenant, wanted[:size])
        return [found for found in overviews if found is not None], len(wanted) > size

    async def versions_page(
        self, tenant: str, adapter: str, before: int | None, size: int, *, include_deleted: bool
    ) -> tuple[list[Version], bool]:
        """Return up to `size` versions, newest first, older than `before`, and whether there are more.

        Raises:
            InvalidArgument: `bad_name`.
            NotFound: `adapter_not_found`.
        """
        names.adapter_name(adapter)
        which = "versions" if include_deleted else "live"
        command = "HKEYS" if include_deleted else "ZRANGE"
        bounds = () if include_deleted else (0, -1)
        [created, found] = await self._catalogue.query(
            ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
            (command, adapter_key(tenant, adapter, which), *bounds),
        )
        if created is None:
            raise adapter_not_found(adapter)
        numbers = sorted((int(number) for number in found), reverse=True)
        wanted = [number for number in numbers if before is None or number < before]
        versions = await self._versions(
            self._catalogue, tenant, [(adapter, number) for number in wanted[:size]]
        )
        return [version for version in versions if version is not None], len(wanted) > size

    async def version(
        self, source: Catalogue | Mutation, tenant: str, adapter: str, number: int
    ) -> Version | None:
        """Return version `number`, be it deleted or not; None where there is none."""
        [found] = await self._versions(source, tenant, [(adapter, number)])
        return found

    async def _overviews(self, tenant: str, adapters: list[str]) -> list[AdapterOverview | None]:
        """Look up several adapters in two transactions; None for one that is not there."""
        commands: list[Command] = []
        for adapter in adapters:
            commands += [
                ("ZREVRANGE", adapter_key(tenant, adapter, "live"), 0, 0),
                ("ZCARD", adapter_key(tenant, adapter, "live")),
                ("HGET", adapter_key(tenant, adapter, "facts"), "created_ms"),
                ("HVALS", adapter_key(tenant, adapter, "aliases")),
            ]
        answers = iter(await self._catalogue.query(*commands))
        rows = [(adapter, *(next(answers) for _ in range(4))) for adapter in adapters]
        newest = [(adapter, int(numbers[0])) for adapter, numbers, *_ in rows if numbers]
        versions = await self._versions(self._catalogue, tenant, newest)
        latest = {adapter: version for (adapter, _), version in zip(newest, versions, strict=True)}
        return [_overview(adapter, latest.get(adapter), *facts) for adapter, _, *facts in rows]

    async def _versions(
        self, source: Catalogue | Mutation, tenant: str, wanted: list[tuple[str, int]]
    ) -> list[Version | None]:
        """Look up several versions in one transaction; None for one that is not there."""
        commands: list[Command] = []
        for adapter, number in wanted:
            commands += [
                ("HGET", adapter_key(tenant, adapter, "versions"), number),
                ("HGET", adapter_key(tenant, adapter, "deletions"), number),
                ("HVALS", adapter_key(tenant, adapter, "aliases")),
            ]
        answers = iter(await source.query(*commands))
        return [_version(number, next(answers), next(answers), next(answers)) for _, number in wanted]

    async def _number(self, tenant: str, ref: AdapterRef) -> int | None:
        [created, newest, move, by_digest] = await self._catalogue.query(
            ("HGET", adapter_key(tenant, ref.name, "facts"), "created_ms"),
            ("ZREVRANGE", adapter_key(tenant, ref.name, "live"), 0, 0),
            ("HGET", adapter_key(tenant, ref.name, "aliases"), ref.alias or ""),
            ("HGET", adapter_key(tenant, ref.name, "digests"), ref.digest or ""),
        )
        if created is None:
            raise adapter_not_found(ref.name)
        if ref.version is not None:
            return ref.version
        if ref.alias is not None:
            if move is None or ALIAS_MOVES.decode(move).is_deletion:
                raise alias_not_found(ref.name, ref.alias)
            return ALIAS_MOVES.decode(move).version
        if ref.digest is not None:
            return None if by_digest is None else int(by_digest)
        if not newest:
            raise _deleted(ref.name)
        return int(newest[0])


def _overview(
    adapter: str, latest: Version | None, count: int, created: bytes | None, aliases: list[bytes]
) -> AdapterOverview | None:
    if created is None:
        return None
    moves = sorted((ALIAS_MOVES.decode(move) for move in aliases), key=lambda move: move.alias)
    return AdapterOverview(
        name=adapter,
        latest=latest,
        num_versions=count,
        aliases=tuple(move for move in moves if not move.is_deletion),
        create_time_ms=int(created),
    )


def _version(
    number: int, record: bytes | None, delete_time_ms: bytes | None, aliases: list[bytes]
) -> Version | None:
    if record is None:
        return None
    pointing = (move.alias for move in map(ALIAS_MOVES.decode, aliases) if move.version == number)
    return Version(
        VERSIONS.decode(record),
        None if delete_time_ms is None else int(delete_time_ms),
        tuple(sorted(pointing)),
    )


def adapter_not_found(adapter: str) -> NotFound:
    """The error for an adapter that is not there, or not this tenant's."""
    return NotFound("adapter_not_found", f"There is no adapter {adapter!r}.", resource=f"adapters/{adapter}")


def version_not_found(adapter: str, number: int) -> NotFound:
    """The error for a version number that was never given."""
    message = f"Adapter {adapter} has no version {number}."
    return NotFound("version_not_found", message, resource=f"adapters/{adapter}:{number}")


def alias_not_found(adapter: str, alias: str) -> NotFound:
    """The error for an alias that points nowhere."""
    message = f"Adapter {adapter} has no alias {alias!r}."
    return NotFound("alias_not_found", message, resource=f"adapters/{adapter}@{alias}")


def _deleted(ref: str) -> NotFound:
    return NotFound("adapter_deleted", f"Adapter {ref} was deleted.", resource=f"adapters/{ref}")
