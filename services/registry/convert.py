"""Records to messages and back: the only place that knows both."""

from __future__ import annotations

import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.registry.v1 import adapter_pb2, base_model_pb2, file_pb2
from services.common import names
from services.common.errors import InvalidArgument
from services.common.fingerprint import BaseFingerprint, ComputeDtype, Quantization, QuantizationType
from services.registry.events import EventKind
from services.registry.files import checked_filename, checked_optional_digest
from services.registry.leases import HeldLease
from services.registry.lookup import AdapterOverview, Version
from services.registry.publishing import Publication
from services.registry.records import (
    AliasMove,
    BaseRecord,
    Card,
    CardMetric,
    FilePurpose,
    FileRecord,
    LinearLayer,
    StoredFile,
)
from services.registry.uploads import UploadSession
from services.registry.usage import UsageCounts
from services.registry.watching import WatchedEvent

_QUANTIZATION = {
    base_model_pb2.QUANTIZATION_TYPE_NONE: QuantizationType.NONE,
    base_model_pb2.QUANTIZATION_TYPE_NF4: QuantizationType.NF4,
    base_model_pb2.QUANTIZATION_TYPE_FP4: QuantizationType.FP4,
}
_QUANTIZATION_BACK = {value: key for key, value in _QUANTIZATION.items()}
_PURPOSE = {
    file_pb2.FILE_PURPOSE_FINE_TUNE: FilePurpose.FINE_TUNE,
    file_pb2.FILE_PURPOSE_FINE_TUNE_RESULTS: FilePurpose.FINE_TUNE_RESULTS,
}
_PURPOSE_BACK = {value: key for key, value in _PURPOSE.items()}
_KIND_BACK = {
    "lora": adapter_pb2.DELTA_KIND_LORA,
    "lora+bias": adapter_pb2.DELTA_KIND_LORA_BIAS,
    "lora+scale": adapter_pb2.DELTA_KIND_LORA_SCALE,
    "head": adapter_pb2.DELTA_KIND_HEAD,
}
_EVENT_BACK = {
    EventKind.VERSION_READY: adapter_pb2.ADAPTER_EVENT_TYPE_VERSION_READY,
    EventKind.VERSION_DELETED: adapter_pb2.ADAPTER_EVENT_TYPE_VERSION_DELETED,
    EventKind.ALIAS_MOVED: adapter_pb2.ADAPTER_EVENT_TYPE_ALIAS_MOVED,
    EventKind.ALIAS_DELETED: adapter_pb2.ADAPTER_EVENT_TYPE_ALIAS_DELETED,
}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def base_from_message(message: base_model_pb2.BaseModel, *, create_time_ms: int) -> BaseRecord:
    """Read a base. Raises `InvalidArgument`: `unsupported_field`, `bad_quantization` or `digest_mismatch`."""
    if message.HasField("create_time"):
        raise InvalidArgument(
            "unsupported_field", "create_time is set by the registry.", field="base_model.create_time"
        )
    return BaseRecord(
        name=message.name,
        fingerprint=_fingerprint(message.fingerprint),
        architecture=message.architecture,
        hidden_size=message.hidden_size,
        num_layers=message.num_layers,
        vocab_size=message.vocab_size,
        max_model_len=message.max_model_len,
        num_parameters=message.num_parameters,
        linear_layers=tuple(
            LinearLayer(layer.name, layer.in_features, layer.out_features) for layer in message.linear_modules
        ),
        create_time_ms=create_time_ms,
    )


def base_to_message(base: BaseRecord) -> base_model_pb2.BaseModel:
    """Write a base."""
    fingerprint = base.fingerprint
    quantization = fingerprint.quantization
    return base_model_pb2.BaseModel(
        name=base.name,
        fingerprint=base_model_pb2.Fingerprint(
            weights_digest=fingerprint.weights_digest,
            config_digest=fingerprint.config_digest,
            tokenizer_digest=fingerprint.tokenizer_digest,
            chat_template_digest=fingerprint.chat_template_digest,
            quantization=base_model_pb2.Quantization(
                type=_QUANTIZATION_BACK[quantization.type],
                block_size=quantization.block_size,
                double_quantization=quantization.double_quantization,
                compute_dtype=quantization.compute_dtype.value,
            ),
            digest=fingerprint.digest,
        ),
        architecture=base.architecture,
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        vocab_size=base.vocab_size,
        max_model_len=base.max_model_len,
        num_parameters=base.num_parameters,
        linear_modules=[
            base_model_pb2.LinearModule(
                name=layer.name, in_features=layer.in_features, out_features=layer.out_features
            )
            for layer in base.linear_layers
        ],
        create_time=_timestamp(base.create_time_ms),
    )


def publication_from_message(header: adapter_pb2.PublishVersionHeader) -> Publication:
    """Read the header of a publication."""
    return Publication(
        adapter=header.adapter,
        base_digest=header.base_fingerprint_digest,
        files=tuple(StoredFile(file.name, file.digest, file.size_bytes) for file in header.files),
        card=_card(header.card),
        idempotency_key=header.idempotency_key,
    )


def version_to_message(version: Version) -> adapter_pb2.AdapterVersion:
    """Write a version."""
    record = version.record
    is_deleted = version.delete_time_ms is not None
    return adapter_pb2.AdapterVersion(
        adapter=record.adapter,
        version=record.version,
        digest=record.digest,
        state=adapter_pb2.VERSION_STATE_DELETED if is_deleted else adapter_pb2.VERSION_STATE_READY,
        base_fingerprint_digest=record.base_digest,
        base_model=record.base_model,
        files=[
            adapter_pb2.AdapterFile(name=file.name, digest=file.digest, size_bytes=file.size_bytes)
            for file in record.files
        ],
        format=adapter_pb2.AdapterFormat(
            kind=_KIND_BACK[record.format.kind],
            max_rank=record.format.max_rank,
            target_modules=record.format.target_modules,
            dtype=_DTYPE_NAMES[record.format.dtype],
            num_parameters=record.format.num_parameters,
            weights_bytes=record.format.weights_bytes,
            num_modules=record.format.num_modules,
        ),
        card=_card_to_message(record.card),
        create_time=_timestamp(record.create_time_ms),
        delete_time=None if version.delete_time_ms is None else _timestamp(version.delete_time_ms),
        aliases=version.aliases,
        warnings=record.warnings,
        traceparent=record.traceparent,
    )


def adapter_to_message(adapter: AdapterOverview) -> adapter_pb2.Adapter:
    """Write an adapter."""
    return adapter_pb2.Adapter(
        name=adapter.name,
        latest_version=None if adapter.latest is None else version_to_message(adapter.latest),
        num_versions=adapter.num_versions,
        aliases=[alias_to_message(move) for move in adapter.aliases],
        create_time=_timestamp(adapter.create_time_ms),
    )


def alias_to_message(move: AliasMove) -> adapter_pb2.Alias:
    """Write a move of an alias; version 0 and an empty digest say that it was deleted."""
    return adapter_pb2.Alias(
        adapter=move.adapter,
        name=move.alias,
        version=move.version,
        digest=move.digest,
        generation=move.generation,
        update_time=_timestamp(move.time_ms),
    )


def event_to_message(event: WatchedEvent, resume_token: str) -> adapter_pb2.AdapterEvent:
    """Write an event."""
    move = event.row.move
    return adapter_pb2.AdapterEvent(
        type=_EVENT_BACK[event.row.kind],
        version=None if event.version is None else version_to_message(event.version),
        alias=None if move is None else alias_to_message(move),
        resume_token=resume_token,
        time=_timestamp(event.row.time_ms),
    )


def lease_to_message(lease: HeldLease) -> adapter_pb2.Lease:
    """Write a lease."""
    return adapter_pb2.Lease(
        digest=lease.digest, holder=lease.holder, expire_time=_timestamp(lease.expire_time_ms)
    )


def usage_to_message(usage: UsageCounts) -> adapter_pb2.Usage:
    """Write what a tenant keeps."""
    return adapter_pb2.Usage(
        adapter_bytes=usage.adapter_bytes,
        file_bytes=usage.file_bytes,
        num_adapters=usage.num_adapters,
        num_versions=usage.num_versions,
        num_files=usage.num_files,
        quota_bytes=usage.quota_bytes,
    )


def upload_to_message(session: UploadSession, committed_bytes: int) -> file_pb2.Upload:
    """Write the state of an upload."""
    return file_pb2.Upload(
        id=session.id,
        committed_bytes=committed_bytes,
        size_bytes=session.size_bytes,
        expire_time=_timestamp(session.expire_time_ms),
    )


def file_header(header: file_pb2.CreateFileHeader) -> tuple[str, FilePurpose, str]:
    """Read filename, purpose and declared digest, which may be empty.

    Raises:
        InvalidArgument: `bad_filename`, `bad_purpose` or `bad_digest`.
    """
    purpose = _PURPOSE.get(header.purpose)
    if purpose is None:
        raise _bad_purpose(header.purpose)
    return (
        checked_filename(header.filename),
        purpose,
        checked_optional_digest(header.digest, "header.digest"),
    )


def purpose_filter(purpose: file_pb2.FilePurpose.ValueType) -> FilePurpose | None:
    """Read the purpose to list; None lists every purpose. Raises `InvalidArgument` (`bad_purpose`)."""
    if purpose == file_pb2.FILE_PURPOSE_UNSPECIFIED:
        return None
    if purpose not in _PURPOSE:
        raise _bad_purpose(purpose)
    return _PURPOSE[purpose]


def file_to_message(record: FileRecord) -> file_pb2.File:
    """Write a file."""
    return file_pb2.File(
        id=record.id,
        filename=record.filename,
        purpose=_PURPOSE_BACK[record.purpose],
        size_bytes=record.size_bytes,
        digest=record.digest,
        create_time=_timestamp(record.create_time_ms),
    )


def _fingerprint(message: base_model_pb2.Fingerprint) -> BaseFingerprint:
    kind = _QUANTIZATION.get(message.quantization.type)
    known_dtypes = [dtype.value for dtype in ComputeDtype]
    if kind is None or message.quantization.compute_dtype not in known_dtypes:
        raise InvalidArgument(
            "bad_quantization",
            "The type and the compute type of the quantization must be given.",
            field="base_model.fingerprint.quantization",
            limit=", ".join(known_dtypes),
        )
    fingerprint = BaseFingerprint(
        weights_digest=message.weights_digest,
        config_digest=message.config_digest,
        tokenizer_digest=message.tokenizer_digest,
        chat_template_digest=message.chat_template_digest,
        quantization=Quantization(
            type=kind,
            block_size=message.quantization.block_size,
            double_quantization=message.quantization.double_quantization,
            compute_dtype=ComputeDtype(message.quantization.compute_dtype),
        ),
    )
    names.digest(message.digest, field="base_model.fingerprint.digest")
    if message.digest != fingerprint.digest:
        raise InvalidArgument(
            "digest_mismatch",
            f"The parts of the fingerprint give {fingerprint.digest}, not {message.digest}.",
            field="base_model.fingerprint.digest",
            value=message.digest,
            limit=fingerprint.digest,
        )
    return fingerprint


def _card(message: adapter_pb2.ModelCard) -> Card:
    return Card(
        description=message.description,
        base_model=message.base_model,
        method=message.method,
        hyperparameters=dict(message.hyperparameters),
        training_data_digest=message.training_data_digest,
        training_rows=message.training_rows,
        trained_tokens=message.trained_tokens,
        seed=message.seed,
        metrics=tuple(
            CardMetric(
                name=metric.name,
                subject=metric.subject,
                value=metric.value,
                ci_low=metric.ci_low if metric.HasField("ci_low") else None,
                ci_high=metric.ci_high if metric.HasField("ci_high") else None,
                rows=metric.rows,
                split=metric.split,
            )
            for metric in message.metrics
        ),
        job_id=message.job_id,
        parent_digest=message.parent_digest,
        stop_token_ids=tuple(message.stop_token_ids),
        libraries=dict(message.libraries),
    )


def _card_to_message(card: Card) -> adapter_pb2.ModelCard:
    return adapter_pb2.ModelCard(
        description=card.description,
        base_model=card.base_model,
        method=card.method,
        hyperparameters=card.hyperparameters,
        training_data_digest=card.training_data_digest,
        training_rows=card.training_rows,
        trained_tokens=card.trained_tokens,
        seed=card.seed,
        metrics=[
            adapter_pb2.Metric(
                name=metric.name,
                subject=metric.subject,
                value=metric.value,
                ci_low=metric.ci_low,
                ci_high=metric.ci_high,
                rows=metric.rows,
                split=metric.split,
            )
            for metric in card.metrics
        ],
        job_id=card.job_id,
        parent_digest=card.parent_digest,
        stop_token_ids=card.stop_token_ids,
        libraries=card.libraries,
    )


def _timestamp(time_ms: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(datetime.datetime.fromtimestamp(time_ms / 1000, datetime.UTC))
    return timestamp


def _bad_purpose(purpose: int) -> InvalidArgument:
    return InvalidArgument(
        "bad_purpose", "A file's purpose is fine-tune or fine-tune-results.", field="purpose", value=purpose
    )
