"""Publishing a version: the announcement, the bytes, the checks, the record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from services.common import names
from services.common.adapter_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterLimits,
    AdapterSummary,
    check_file_names,
    read_adapter,
    version_digest,
)
from services.common.adapter_format.strict_json import canonical_json
from services.common.errors import InvalidArgument, ResourceExhausted
from services.registry.blobs import Upload, too_large
from services.registry.cards import check_card
from services.registry.files import digest_mismatch
from services.registry.records import BaseRecord, Card, FormatFacts, StoredFile

MAX_IDEMPOTENCY_KEY_CHARS = 64


@dataclass(frozen=True, slots=True)
class Publication:
    """What a publisher announces before the bytes. Without an idempotency key each call makes a version."""

    adapter: str
    base_digest: str
    files: tuple[StoredFile, ...]
    card: Card
    idempotency_key: str

    def check(self, limits: AdapterLimits) -> None:
        """Refuse what no bytes could make right.

        Raises:
            InvalidArgument: `bad_name`, `bad_digest`, `missing_file`, `unexpected_file`,
                `unsafe_weight_format`,
                `archives_not_supported`, `bad_card` or `bad_idempotency_key`.
            ResourceExhausted: `config_too_large` or `too_large`.
        """
        names.adapter_name(self.adapter, field="header.adapter")
        names.digest(self.base_digest, field="header.base_fingerprint_digest")
        check_file_names([file.name for file in self.files])
        if len(self.files) != 2:
            raise InvalidArgument("unexpected_file", "A file is announced twice.", field="header.files")
        for file in self.files:
            names.digest(file.digest, field="header.files.digest")
            if file.size_bytes > self.limit_bytes(file.name, limits):
                raise self._too_large(file, limits)
        check_card(self.card)
        key = self.idempotency_key
        if len(key) > MAX_IDEMPOTENCY_KEY_CHARS or not (key.isascii() and key.isprintable()):
            message = f"idempotency_key has at most {MAX_IDEMPOTENCY_KEY_CHARS} printable ASCII characters."
            raise InvalidArgument(
                "bad_idempotency_key",
                message,
                field="header.idempotency_key",
                limit=MAX_IDEMPOTENCY_KEY_CHARS,
            )

    @property
    def content_digest(self) -> str:
        """Over everything but the idempotency key, so that a repeated call is known from a new one."""
        files = tuple(sorted(self.files, key=lambda file: file.name))
        content = dataclasses.replace(self, files=files, idempotency_key="")
        plain = _ADAPTER.dump_python(content, mode="json")
        return "sha256:" + hashlib.sha256(canonical_json(plain)).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Bytes of both files, as announced."""
        return sum(file.size_bytes for file in self.files)

    def file(self, name: str) -> StoredFile:
        """The announced file `name`."""
        return next(file for file in self.files if file.name == name)

    @staticmethod
    def limit_bytes(name: str, limits: AdapterLimits) -> int:
        """The size limit of a file of an adapter."""
        return limits.max_config_bytes if name == CONFIG_FILE else limits.max_weights_bytes

    def _too_large(self, file: StoredFile, limits: AdapterLimits) -> ResourceExhausted:
        limit_bytes = self.limit_bytes(file.name, limits)
        if file.name == CONFIG_FILE:
            message = f"{CONFIG_FILE} may have {limit_bytes} bytes."
            return ResourceExhausted(
                "config_too_large", message, field="header.files", limit=limit_bytes, final=True
            )
        return too_large("header.files", file.size_bytes, limit_bytes)


_ADAPTER = TypeAdapter(Publication)


class Incoming:
    """The two files of a publication on their way in, in `folder`."""

    def __init__(self, publication: Publication, folder: Path) -> None:
        self._publication = publication
        self.uploads: Mapping[str, Upload] = {
            file.name: Upload(folder / file.name, max_bytes=file.size_bytes, field=file.name)
            for file in publication.files
        }

    def write(self, name: str, data: bytes) -> None:
        """Append bytes to the file `name`.

        Raises:
            InvalidArgument: `unexpected_file`, or `digest_mismatch` where more comes than was announced.
        """
        upload = self.uploads.get(name)
        if upload is None:
            message = f"{name[:120]!r} was not announced."
            raise InvalidArgument("unexpected_file", message, field="chunk.file", value=name)
        announced = self._publication.file(name)
        if upload.size_bytes + len(data) > announced.size_bytes:
            message = f"{name} has more than the {announced.size_bytes} bytes announced."
            raise InvalidArgument("digest_mismatch", message, field="chunk", limit=announced.size_bytes)
        upload.write(data)

    def check(self, base: BaseRecord, limits: AdapterLimits) -> AdapterSummary:
        """Check digests, sizes and format of what came.

        Raises:
            InvalidArgument, ResourceExhausted: `digest_mismatch` and everything that `read_adapter` raises.
        """
        for name, upload in self.uploads.items():
            announced = self._publication.file(name)
            if upload.digest != announced.digest or upload.size_bytes != announced.size_bytes:
                raise digest_mismatch(f"header.files.{name}", announced.digest, upload.digest)
        return read_adapter(
            self.uploads[CONFIG_FILE].path.read_bytes(),
            self.uploads[WEIGHTS_FILE].path,
            base_modules=base.module_table(),
            weights_digest=self.uploads[WEIGHTS_FILE].digest,
            limits=limits,
        )

    def close(self) -> None:
        """Close the scratch files."""
        for upload in self.uploads.values():
            upload.close()


def format_facts(summary: AdapterSummary) -> FormatFacts:
    """What is recorded of an adapter's format."""
    return FormatFacts(
        kind=summary.kind.value,
        max_rank=summary.max_rank,
        target_modules=summary.targets,
        dtype=summary.dtype,
        num_parameters=summary.num_parameters,
        weights_bytes=summary.weights_bytes,
        num_modules=len(summary.modules),
    )


def identity(summary: AdapterSummary, base: BaseRecord) -> str:
    """The digest of the version that `summary` describes, on `base`."""
    return version_digest(
        config_digest=summary.config_digest,
        weights_digest=summary.weights_digest,
        base_digest=base.fingerprint.digest,
    )
