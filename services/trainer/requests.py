"""What callers may ask for: every field of a request checked, every default filled in."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime

from lorafleet.registry.v1 import file_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common import telemetry
from services.common.errors import InvalidArgument, NotFound, ResourceExhausted
from services.common.ids import is_id, new_id
from services.common.names import adapter_name
from services.trainer.bases import BaseCatalog, TrainableBase
from services.trainer.config import TrainerSettings
from services.trainer.conversion import given_spec
from services.trainer.job import JOB_PREFIX, JobRequest
from services.trainer.optimizers import check_optimizer
from services.trainer.registry_client import RegistryClient
from services.trainer.spec import TrainingSpec, resolve_spec

MAX_SEED = 2**31 - 1
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_KEY_CHARS = 64


class RequestChecker:
    """Turns requests into what the trainer works with, or refuses them by name."""

    def __init__(self, bases: BaseCatalog, registry: RegistryClient, settings: TrainerSettings) -> None:
        self._bases = bases
        self._registry = registry
        self._settings = settings

    async def job_request(
        self, request: trainer_service_pb2.CreateJobRequest, tenant: str
    ) -> tuple[JobRequest, TrainableBase]:
        """Return the job that `request` asks for, with a new id, and its base.

        Raises:
            InvalidArgument: `bad_name`, `bad_hyperparameter`, `unsupported_method`, `unsupported_optimizer`,
                `bad_metadata`, `bad_idempotency_key`, `bad_purpose`.
            NotFound: `base_not_found`, `file_not_found`.
            ResourceExhausted: `dataset_too_large`.
        """
        base = self._bases.find(request.base_model)
        spec = self._spec(request.spec, base)
        _check_patience(spec, request.validation_file)
        job_id = new_id(JOB_PREFIX)
        adapter = adapter_name(request.adapter) if request.adapter else job_id
        _check_seed(request)
        _check_metadata(request.metadata)
        _check_key(request.idempotency_key)
        await self._check_files(request.training_file, request.validation_file)
        seed = request.seed if request.HasField("seed") else secrets.randbelow(MAX_SEED + 1)
        asked = JobRequest(
            id=job_id,
            tenant=tenant,
            base_model=base.name,
            training_file=request.training_file,
            validation_file=request.validation_file,
            adapter=adapter,
            spec=spec,
            seed=seed,
            metadata=dict(request.metadata),
            create_time=datetime.now(UTC),
            idempotency_key=request.idempotency_key,
            request_digest=hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest(),
            traceparent=telemetry.traceparent(),
        )
        return asked, base

    async def dataset_request(
        self, request: trainer_service_pb2.ValidateDatasetRequest
    ) -> tuple[TrainableBase, TrainingSpec]:
        """Return base and specification for a check of files; raises as `job_request`."""
        base = self._bases.find(request.base_model)
        spec = self._spec(request.spec, base)
        _check_patience(spec, request.validation_file)
        await self._check_files(request.training_file, request.validation_file)
        return base, spec

    def _spec(self, message: job_pb2.TrainingSpec, base: TrainableBase) -> TrainingSpec:
        spec = resolve_spec(
            given_spec(message), max_model_len=base.record.max_model_len, module_names=list(base.modules)
        )
        check_optimizer(spec.optimizer, self._settings.device_type)
        return spec

    async def _check_files(self, training_file: str, validation_file: str) -> None:
        await self._check_file(training_file, "training_file")
        if validation_file:
            await self._check_file(validation_file, "validation_file")

    async def _check_file(self, file_id: str, field: str) -> None:
        if not is_id("file", file_id):
            raise NotFound("file_not_found", f"{field} names no file", field=field, value=file_id)
        file = await self._registry.file(file_id)
        if file.purpose != file_pb2.FilePurpose.FILE_PURPOSE_FINE_TUNE:
            raise InvalidArgument(
                "bad_purpose", f"{field} must have the purpose fine-tune", field=field, value=file_id
            )
        if file.size_bytes > self._settings.max_file_bytes:
            raise ResourceExhausted(
                "dataset_too_large",
                f"{field} has {file.size_bytes:,} bytes; the limit is {self._settings.max_file_bytes:,}",
                field=field,
                value=file.size_bytes,
                limit=self._settings.max_file_bytes,
                final=True,
            )


def _check_patience(spec: TrainingSpec, validation_file: str) -> None:
    if spec.early_stopping_patience and not validation_file and not spec.validation_fraction:
        raise InvalidArgument(
            "bad_hyperparameter",
            "early_stopping_patience needs held-out rows; give a validation_file or validation_fraction",
            field="spec.early_stopping_patience",
            value=spec.early_stopping_patience,
        )


def _check_seed(request: trainer_service_pb2.CreateJobRequest) -> None:
    if request.HasField("seed") and not 0 <= request.seed <= MAX_SEED:
        raise InvalidArgument(
            "bad_hyperparameter",
            f"seed is {request.seed}; it must be 0 to {MAX_SEED}",
            field="seed",
            value=request.seed,
            limit=f"0 to {MAX_SEED}",
        )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    keys_fit = all(0 < len(key) <= MAX_METADATA_KEY_CHARS for key in metadata)
    values_fit = all(len(value) <= MAX_METADATA_VALUE_CHARS for value in metadata.values())
    if len(metadata) > MAX_METADATA_PAIRS or not keys_fit or not values_fit:
        limit = (
            f"{MAX_METADATA_PAIRS} pairs, keys of 1 to {MAX_METADATA_KEY_CHARS} and values of up to"
            f" {MAX_METADATA_VALUE_CHARS} characters"
        )
        raise InvalidArgument("bad_metadata", f"metadata takes {limit}", field="metadata", limit=limit)


def _check_key(key: str) -> None:
    if key and (len(key) > MAX_KEY_CHARS or not key.isprintable() or " " in key):
        limit = f"1 to {MAX_KEY_CHARS} printable characters without blanks"
        raise InvalidArgument(
            "bad_idempotency_key",
            f"idempotency_key must be {limit}",
            field="idempotency_key",
            value=key,
            limit=limit,
        )
