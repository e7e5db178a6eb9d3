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

from services.common.call_context import call_scope
from services.common.errors import DataLoss, FailedPrecondition
from services.common.store import ObjectStore
from services.common.store.disk_errors import disk_errors
from services.trainer.bases import BaseCatalog
from services.trainer.book import JobBook
from services.trainer.checkpoint_store import WEIGHTS, CheckpointStore
from services.trainer.config import TrainerSettings
from services.trainer.export_process import ADAPTER, CHECKPOINT, export
from services.trainer.job import Checkpoint, Job, Publication
from services.trainer.journal import checkpoint_prefix
from services.trainer.publishing import checkpoint_card, job_result
from services.trainer.registry_client import RegistryClient

_logger = logging.getLogger("lorafleet.trainer.publisher")

# With the id of a checkpoint before it, this fits into the registry's 64 characters.
_KEY_DIGITS = 24


class CheckpointPublisher:
    """Makes versions of checkpoints, one at a time: each takes the memory of a base.

    The work goes on when its caller has gone, so that a base which takes longer to load than a call may last
    is published all the same: the same call again waits for the same work.
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

        Raises:
            FailedPrecondition: `checkpoint_discarded`.
            NotFound: `base_not_found`, where this trainer no longer has the job's base.
            DataLoss: `corrupt_checkpoint`.
        """
        known = await self._known(job, checkpoint, adapter)
        if known:
            return known
        key = (checkpoint.id, adapter)
        task = self._in_work.get(key)
        if task is None:
            # A context of its own: the deadline of this call is none of the work's.
            task = asyncio.create_task(self._work(job, checkpoint, adapter), context=Context())
            self._in_work[key] = task
            task.add_done_callback(partial(self._done, key))
        return await asyncio.shield(task)

    async def stop(self) -> None:
        """End what is in work; it can be asked for again."""
        tasks = list(self._in_work.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _known(self, job: Job, checkpoint: Checkpoint, adapter: str) -> str:
        if checkpoint.fine_tuned_model and job.result is not None and job.result.adapter == adapter:
            return checkpoint.fine_tuned_model
        for each in await self._book.publications(job):
            if (each.checkpoint_id, each.adapter) == (checkpoint.id, adapter):
                return each.fine_tuned_model
        return ""

    async def _work(self, job: Job, checkpoint: Checkpoint, adapter: str) -> str:
        request = job.request
        base = self._bases.find(request.base_model)
        work = tempfile.TemporaryDirectory(
            prefix="lorafleet-checkpoint-", dir=self._settings.work_folder, ignore_cleanup_errors=True
        )
        with call_scope(tenant=request.tenant, request_id=job.id), work as name:
            folder = Path(name)
            # At once, before a job that runs makes its next checkpoint and discards this one.
            await asyncio.to_thread(self._fetch, job, checkpoint, folder / CHECKPOINT)
            async with self._one_at_a_time:
                error = await export(request, folder)
            published = await self._registry.publish(
                folder / ADAPTER,
                adapter=adapter,
                base_fingerprint_digest=base.fingerprint.digest,
                card=checkpoint_card(job, checkpoint, base.encoder, conversion_error=error),
                idempotency_key=_idempotency_key(checkpoint, adapter),
            )
        model = job_result(job, published).fine_tuned_model
        publication = Publication(checkpoint.id, adapter, model, datetime.now(UTC))
        await self._book.add_publication(job, publication)
        _logger.info("checkpoint published", extra={"job": job.id, "checkpoint": checkpoint.id})
        return model

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
        del self._in_work[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            # Its caller may have gone.
            _logger.warning("checkpoint not published", extra={"checkpoint": key[0], "detail": str(error)})


def _idempotency_key(checkpoint: Checkpoint, adapter: str) -> str:
    digest = hashlib.sha256(adapter.encode("ascii")).hexdigest()
    return f"{checkpoint.id}:{digest[:_KEY_DIGITS]}"
