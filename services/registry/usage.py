"""How much a tenant keeps, and the most that it may."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.errors import ResourceExhausted
from services.registry.catalogue import Catalogue, Mutation
from services.registry.index import tenant_key


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """What a tenant keeps; deleted versions and files do not count. `quota_bytes` 0 means no quota."""

    adapter_bytes: int
    file_bytes: int
    num_adapters: int
    num_versions: int
    num_files: int
    quota_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of adapters and files together."""
        return self.adapter_bytes + self.file_bytes


class Usage:
    """Counts and limits what each tenant keeps."""

    def __init__(self, catalogue: Catalogue, quota_bytes: int) -> None:
        self._catalogue = catalogue
        self._quota_bytes = quota_bytes

    async def of(self, tenant: str) -> UsageCounts:
        """Return what `tenant` keeps now."""
        return await self._counted(self._catalogue, tenant)

    async def check_room(self, source: Catalogue | Mutation | None, tenant: str, size_bytes: int) -> None:
        """Refuse `size_bytes` more where they exceed the quota. Raises `quota_exceeded`."""
        if not self._quota_bytes:
            return
        counts = await self._counted(source or self._catalogue, tenant)
        if counts.total_bytes + size_bytes > self._quota_bytes:
            raise ResourceExhausted(
                "quota_exceeded",
                f"{size_bytes} bytes more than the {counts.total_bytes} kept now exceed the quota of "
                f"{self._quota_bytes} bytes.",
                field="size_bytes",
                value=size_bytes,
                limit=self._quota_bytes,
                final=True,
                metadata={"used_bytes": str(counts.total_bytes)},
            )

    async def _counted(self, source: Catalogue | Mutation, tenant: str) -> UsageCounts:
        [versions, files, num_adapters] = await source.query(
            ("HVALS", tenant_key(tenant, "version_bytes")),
            ("HVALS", tenant_key(tenant, "file_bytes")),
            ("ZCARD", tenant_key(tenant, "adapters")),
        )
        return UsageCounts(
            adapter_bytes=sum(map(int, versions)),
            file_bytes=sum(map(int, files)),
            num_adapters=num_adapters,
            num_versions=len(versions),
            num_files=len(files),
            quota_bytes=self._quota_bytes,
        )
