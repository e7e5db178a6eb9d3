"""What the registry writes down: one immutable record per event, as JSON objects in the store.

Times are Unix milliseconds. Digests are `sha256:<hex>`. What can be watched bears two numbers that the
catalogue sets: `sequence`, the place of the event among all records ever written (0: written before events
were kept), and `epoch`, which writer wrote it (`services.registry.writer`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from services.common.errors import InvalidArgument
from services.common.fingerprint import BaseFingerprint

RecordT = TypeVar("RecordT")

_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "embed_in")


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of a base that adapters may target."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """A base model was registered under a name."""

    name: str
    fingerprint: BaseFingerprint
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_model_len: int
    num_parameters: int
    linear_layers: tuple[LinearLayer, ...]
    create_time_ms: int

    def module_table(self) -> dict[str, tuple[int, int]]:
        """Return name -> (in_features, out_features) of all that adapters may target: the linear layers, and
        the ends of the model under each name that architectures give them.
        """
        table = {layer.name: (layer.in_features, layer.out_features) for layer in self.linear_layers}
        decoders = {layer.name.partition(".layers.")[0] for layer in self.linear_layers}
        table |= dict.fromkeys(_HEADS, (self.hidden_size, self.vocab_size))
        table |= {
            f"{decoder}.{name}": (self.vocab_size, self.hidden_size)
            for decoder in decoders
            for name in _EMBEDDINGS
        }
        return table


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One of the two files of a version; its bytes are the blob `digest`."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class FormatFacts:
    """What was read out of the files of a version."""

    kind: str
    max_rank: int
    target_modules: tuple[str, ...]
    dtype: str
    num_parameters: int
    weights_bytes: int
    num_modules: int


@dataclass(frozen=True, slots=True)
class CardMetric:
    """One measured figure of a card."""

    name: str
    subject: str
    value: float
    ci_low: float | None
    ci_high: float | None
    rows: int
    split: str


@dataclass(frozen=True, slots=True)
class Card:
    """Where a version came from and what was measured on it, as its publisher says."""

    description: str = ""
    base_model: str = ""
    method: str = ""
    hyperparameters: dict[str, str] = field(default_factory=dict)
    training_data_digest: str = ""
    training_rows: int = 0
    trained_tokens: int = 0
    seed: int = 0
    metrics: tuple[CardMetric, ...] = ()
    job_id: str = ""
    parent_digest: str = ""
    stop_token_ids: tuple[int, ...] = ()
    libraries: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version of an adapter was published."""

    tenant: str
    adapter: str
    version: int
    digest: str
    base_digest: str
    base_model: str
    files: tuple[StoredFile, ...]
    format: FormatFacts
    card: Card
    warnings: tuple[str, ...]
    create_time_ms: int
    idempotency_key: str
    content_digest: str
    sequence: int = 0
    epoch: int = 0
    traceparent: str = ""
    """W3C trace context of the call that published it; empty where that was not traced."""

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class VersionDeletion:
    """A version was marked deleted."""

    tenant: str
    adapter: str
    version: int
    delete_time_ms: int
    sequence: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class AliasMove:
    """An alias was created, moved or deleted (`version` 0). `generation` grows by one with every move."""

    tenant: str
    adapter: str
    alias: str
    generation: int
    version: int
    digest: str
    time_ms: int
    sequence: int = 0
    epoch: int = 0

    @property
    def is_deletion(self) -> bool:
        """Whether the alias points nowhere since this move."""
        return self.version == 0


class FilePurpose(enum.Enum):
    """What a file is for."""

    FINE_TUNE = "fine-tune"
    FINE_TUNE_RESULTS = "fine-tune-results"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file was uploaded."""

    tenant: str
    id: str
    filename: str
    purpose: FilePurpose
    size_bytes: int
    digest: str
    create_time_ms: int


@dataclass(frozen=True, slots=True)
class FileDeletion:
    """A file was deleted."""

    tenant: str
    id: str
    delete_time_ms: int


Event = VersionRecord | VersionDeletion | AliasMove
Record = BaseRecord | VersionRecord | VersionDeletion | AliasMove | FileRecord | FileDeletion


class CorruptRecordError(Exception):
    """A stored record cannot be read."""


class Codec(Generic[RecordT]):
    """JSON bytes to one kind of record and back."""

    def __init__(self, kind: type[RecordT]) -> None:
        self._adapter: TypeAdapter[RecordT] = TypeAdapter(kind)

    def encode(self, record: RecordT) -> bytes:
        """Return `record` as JSON."""
        return self._adapter.dump_json(record)

    def decode(self, data: bytes) -> RecordT:
        """Return the record in `data`. Raises `CorruptRecordError`."""
        try:
            return self._adapter.validate_json(data)
        except (ValidationError, InvalidArgument) as error:
            raise CorruptRecordError(str(error)) from error


BASES = Codec(BaseRecord)
VERSIONS = Codec(VersionRecord)
VERSION_DELETIONS = Codec(VersionDeletion)
ALIAS_MOVES = Codec(AliasMove)
FILES = Codec(FileRecord)
FILE_DELETIONS = Codec(FileDeletion)

# In the order in which a rebuild applies them: a deletion finds what it deletes.
CODECS: dict[type[Any], Codec[Any]] = {
    BaseRecord: BASES,
    VersionRecord: VERSIONS,
    VersionDeletion: VERSION_DELETIONS,
    AliasMove: ALIAS_MOVES,
    FileRecord: FILES,
    FileDeletion: FILE_DELETIONS,
}
