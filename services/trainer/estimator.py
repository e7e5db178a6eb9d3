"""Estimates of jobs on this trainer: how fast it is, what it may use, and how much data there seems to be."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

from services.common.errors import InvalidArgument
from services.trainer.bases import TrainableBase
from services.trainer.config import TrainerSettings
from services.trainer.estimate import DataSize, Pace, estimate
from services.trainer.index import JobIndex
from services.trainer.job import Estimate
from services.trainer.memory import job_limit_bytes
from services.trainer.preparation import check_data
from services.trainer.registry_client import RegistryClient
from services.trainer.spec import OverlongPolicy, TaskMetric, TrainingSpec

# So much of a training file is looked at before its job is created.
SAMPLE_BYTES = 128 * 1024


class Estimator:
    """Makes the estimates that callers see."""

    def __init__(self, index: JobIndex, registry: RegistryClient, settings: TrainerSettings) -> None:
        self._index = index
        self._registry = registry
        self._settings = settings

    async def of(self, spec: TrainingSpec, size: DataSize, base: TrainableBase) -> Estimate:
        """Return what a job over that much data will take."""
        measured = await self._index.pace(base.name)
        device = self._settings.device_type
        pace = (
            Pace.assumed(base, spec, device_type=device, cores=self._settings.torch_threads)
            if measured is None
            else Pace(measured, "earlier_jobs")
        )
        limit = await asyncio.to_thread(job_limit_bytes, self._settings)
        return estimate(spec, size, base, pace=pace, limit_bytes=limit)

    async def at_first_sight(
        self, spec: TrainingSpec, training_file: str, base: TrainableBase, *, holds_out: bool
    ) -> Estimate | None:
        """Return what a job will take if all of its data is like the beginning of its training file.

        None where nothing can be told: what is wrong with the file is for the validation to say.

        Args:
            spec: what is trained.
            training_file: id of a file that exists.
            base: what it is trained on.
            holds_out: whether rows are held out of the training file.
        """
        file = await self._registry.file(training_file)
        head = await self._registry.download_head(training_file, min(SAMPLE_BYTES, file.size_bytes))
        if len(head) < file.size_bytes:
            head = head[: head.rfind(b"\n") + 1]
        try:
            size = await asyncio.to_thread(self._size_of, head, base, spec, holds_out)
        except InvalidArgument:
            return None
        scale = file.size_bytes / len(head)
        whole = DataSize(
            rows=round(size.rows * scale),
            tokens=round(size.tokens * scale),
            supervised_tokens=round(size.supervised_tokens * scale),
            max_row_tokens=size.max_row_tokens,
        )
        return await self.of(spec, whole, base)

    def _size_of(self, head: bytes, base: TrainableBase, spec: TrainingSpec, holds_out: bool) -> DataSize:
        """Return how much data the whole lines in `head` hold; raise as `check_data`."""
        reject = spec.overlong_policy is OverlongPolicy.REJECT
        lenient = replace(
            spec,
            overlong_policy=OverlongPolicy.TRUNCATE if reject else spec.overlong_policy,
            validation_fraction=spec.validation_fraction if holds_out else 0.0,
            task_metric=TaskMetric.NONE,
        )
        with tempfile.TemporaryDirectory(
            prefix="lorafleet-sample-", dir=self._settings.work_folder
        ) as folder:
            path = Path(folder) / "head.jsonl"
            path.write_bytes(head)
            return DataSize.of(check_data(path, None, base.encoder, lenient, seed=0))
