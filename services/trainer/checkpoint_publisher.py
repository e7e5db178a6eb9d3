"""Publishing a checkpoint of a job, in whatever state the job is, beside the work on it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
from contextvars import Context
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from services.common import telemetry
from services.common.call_context import call_scope
from services.common.errors import DataLoss, FailedPrecondition
from services.common.store import ObjectStore
from services.common.store.disk_errors import disk_errors
from services.trainer.bases import BaseCatalog, TrainableBase
from services.trainer.book import JobBook
from services.trainer.checkpoint_store import WEIGHTS, CheckpointStore
from services.trainer.config import TrainerSettings
from services.trainer.export_process import ADAPTER, CHECKPOINT, Exported, ExportRequest, export
from services.trainer.job import (
    Checkpoint,
    CheckpointReport,
    DatasetReport,
    Job,
    ParityReport,
    Publication,
)
from services.trainer.journal import checkpoint_prefix
from services.trainer.parity import ParityGate, parity_failed
from services.trainer.publishing import checkpoint_card, job_result
from services.trainer.registry_client import RegistryClient

_logger = logging.getLogger("lorafleet.trainer.publisher")

# With the id of a checkpoint before them, these fit into the registry's 64 characters of a key or a name.
_KEY_DIGITS = 24


class CheckpointPublisher:
    """Makes versions of checkpoints, one at a time: each takes the memory of a base.

    The work goes on when its caller has gone, so that a base which takes longer to load than a call may last
    is published all the same: the same call again waits for the same work, or is told why it failed.
    """

    def __init__(
        self,
        book: JobBook,
        store: ObjectStore,
        registry: RegistryClient,
        bases: BaseCatalog,
        settings: TrainerSettings,
    ) -> None:
        self._book = book
        self._store = store
        self._registry = registry
        self._bases = bases
        self._settings = settings
        self._one_at_a_time = asyncio.Lock()
        self._in_work: dict[tuple[str, str], asyncio.Task[str]] = {}

    async def publish(self, job: Job, checkpoint: Checkpoint, adapter: str) -> str:
        """Publish `checkpoint` as a version of `adapter`, once, and return the name of the model.

        It is measured first, as a job's version is, and what was measured is kept whether it is published or
        not. Where it was refused, the same call measures again.

        Raises:
            FailedPrecondition: `checkpoint_discarded`; `parity_failed`.
            NotFound: `base_not_found`, where this trainer no longer has the job's base; `file_not_found`,
                where the registry no longer has the rows to measure it on.
            DataLoss: `corrupt_checkpoint` or `dataset_changed`.
        """
        known = await self._known(job, checkpoint, adapter)
        if known:
            return known
        key = (checkpoint.id, adapter)
        task = self._in_work.get(key)
        if task is None:
            # A context of its own: the deadline of this call is none of the work's. The trace goes on.
            work = self._work(job, checkpoint, adapter, telemetry.traceparent())
            task = asyncio.create_task(work, context=Context())
            self._in_work[key] = task
            task.add_done_callback(partial(self._done, key))
        try:
            return await asyncio.shield(task)
        finally:
            if task.done() and self._in_work.get(key) is task:
                del self._in_work[key]

    async def stop(self) -> None:
        """End what is in work; it can be asked for again."""
        tasks = list(self._in_work.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _known(self, job: Job, checkpoint: Checkpoint, adapter: str) -> str:
        if checkpoint.fine_tuned_model and job.result is not None and job.result.adapter == adapter:
            return checkpoint.fine_tuned_model
        kept = await self._kept(job, checkpoint, adapter)
        return "" if kept is None else kept.fine_tuned_model

    async def _kept(self, job: Job, checkpoint: Checkpoint, adapter: str) -> Publication | None:
        """Return what is known of publishing `checkpoint` as a version of `adapter`."""
        for each in await self._book.publications(job):
            if (each.checkpoint_id, each.adapter) == (checkpoint.id, adapter):
                return each
        return None

    async def _work(self, job: Job, checkpoint: Checkpoint, adapter: str, traceparent: str) -> str:
        request = job.request
        base = self._bases.find(request.base_model)
        work = tempfile.TemporaryDirectory(
            prefix="lorafleet-checkpoint-", dir=self._settings.work_folder, ignore_cleanup_errors=True
        )
        scope = call_scope(tenant=request.tenant, request_id=job.id)
        with scope, telemetry.child_of(traceparent), work as name:
            folder = Path(name)
            # At once, before a job that runs makes its next checkpoint and discards this one.
            await asyncio.to_thread(self._fetch, job, checkpoint, folder / CHECKPOINT)
            async with self._one_at_a_time:
                report = await self._written(job, checkpoint, adapter, base, folder)
            published = await self._registry.publish(
                folder / ADAPTER,
                adapter=adapter,
                base_fingerprint_digest=base.fingerprint.digest,
                card=checkpoint_card(job, checkpoint, base.encoder, report),
                idempotency_key=_idempotency_key(checkpoint, adapter),
            )
        model = job_result(job, published).fine_tuned_model
        await self._keep(job, checkpoint, adapter, report, model=model)
        _logger.info("checkpoint published", extra={"job": job.id, "checkpoint": checkpoint.id})
        return model

    async def _written(
        self, job: Job, checkpoint: Checkpoint, adapter: str, base: TrainableBase, folder: Path
    ) -> CheckpointReport:
        """Have the adapter written and measured; raise `parity_failed` where served it is another."""
        kept = await self._kept(job, checkpoint, adapter)
        if kept is not None and kept.report is not None and self._passes(kept.report):
            # Of an attempt that ended before the registry's answer was kept: it must get the same card again.
            await export(ExportRequest(job.request), folder)
            return kept.report
        exported = await export(ExportRequest(job.request, await self._dataset(job, folder)), folder)
        parity = await self._parity(checkpoint, adapter, base, folder, exported)
        report = CheckpointReport(exported.conversion_error, exported.evaluation, exported.collapsed, parity)
        await self._keep(job, checkpoint, adapter, report)
        if parity is not None and not parity.holds:
            raise parity_failed(parity)
        return report

    def _passes(self, report: CheckpointReport) -> bool:
        if report.parity is None:
            return self._settings.inference_target is None
        return report.parity.holds

    async def _dataset(self, job: Job, folder: Path) -> DatasetReport | None:
        """Fetch what the checkpoint is measured on, and return its report; None where nothing is to be."""
        assert job.dataset is not None, "a job that trained was validated"
        evaluates = job.dataset.validation_rows and job.request.spec.evaluation_rows
        if not evaluates and self._settings.inference_target is None:
            return None
        for file_id in job.request.files:
            await self._registry.download(file_id, folder / file_id, max_bytes=self._settings.max_file_bytes)
        return job.dataset

    async def _parity(
        self, checkpoint: Checkpoint, adapter: str, base: TrainableBase, folder: Path, exported: Exported
    ) -> ParityReport | None:
        gate = ParityGate.configured(self._settings, self._registry)
        if gate is None:
            return None
        try:
            report = await gate.check(
                folder / ADAPTER,
                exported.probes,
                name=f"{checkpoint.id}-{_digits(adapter)}",
                base_fingerprint_digest=base.fingerprint.digest,
            )
        finally:
            await gate.close()
        if report is None:
            text = "the inference service has another base: what it computes was not compared"
            _logger.warning(text, extra={"checkpoint": checkpoint.id})
        return report

    async def _keep(
        self, job: Job, checkpoint: Checkpoint, adapter: str, report: CheckpointReport, *, model: str = ""
    ) -> None:
        publication = Publication(checkpoint.id, adapter, model, datetime.now(UTC), report)
        await self._book.add_publication(job, publication)

    def _fetch(self, job: Job, checkpoint: Checkpoint, folder: Path) -> None:
        checkpoints = CheckpointStore(self._store, checkpoint_prefix(job.id))
        try:
            with disk_errors("work folder"):
                checkpoints.load(checkpoint.id, checkpoint.manifest_digest, folder, names={WEIGHTS})
        except DataLoss as error:
            if checkpoints.is_kept(checkpoint.id):
                raise
            raise FailedPrecondition(
                "checkpoint_discarded",
                "only the last two checkpoints of a job are kept; this one is gone",
                field="checkpoint_id",
                value=checkpoint.id,
                final=True,
            ) from error

    def _done(self, key: tuple[str, str], task: asyncio.Task[str]) -> None:
        if task.cancelled() or task.exception() is None:
            self._in_work.pop(key, None)
            return
        # It stays for the next caller where there is none now.
        detail = str(task.exception())
        _logger.warning("checkpoint not published", extra={"checkpoint": key[0], "detail": detail})


def _idempotency_key(checkpoint: Checkpoint, adapter: str) -> str:
    return f"{checkpoint.id}:{_digits(adapter)}"


def _digits(adapter: str) -> str:
    return hashlib.sha256(adapter.encode("ascii")).hexdigest()[:_KEY_DIGITS]
