"""Checks of training files: on their own, and as the first stage of every job."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import threading
from pathlib import Path

from services.common.call_context import call_scope
from services.common.errors import DeadlineExceeded, Internal, LorafleetError, Unavailable
from services.common.failpoints import failpoint
from services.common.telemetry import child_of
from services.trainer.bases import BaseCatalog, TrainableBase
from services.trainer.book import Claim, JobBook, paused
from services.trainer.config import TrainerSettings
from services.trainer.estimate import DataSize, require_fit
from services.trainer.estimator import Estimator
from services.trainer.failure import JobFailure
from services.trainer.index import Lane, StaleLeaseError
from services.trainer.job import DatasetReport, Draft, Facts, JobState, Level
from services.trainer.preparation import check_data
from services.trainer.registry_client import RegistryClient
from services.trainer.spec import TrainingSpec

_logger = logging.getLogger("lorafleet.trainer.validator")

IDLE_SECONDS = 0.3
RETRY_SECONDS = 0.5
WATCH_SECONDS = 0.5
# Reading and tokenising hold the interpreter; more at once would starve the service's answers.
CHECKS_AT_ONCE = 2


class _GivenUpError(Exception):
    """The check was not wanted any more."""


class DataCheck:
    """Fetches files from the registry and reads them as a job would."""

    def __init__(self, registry: RegistryClient, settings: TrainerSettings) -> None:
        self._registry = registry
        self._settings = settings
        self._slots = asyncio.Semaphore(CHECKS_AT_ONCE)

    async def run(
        self,
        base: TrainableBase,
        training_file: str,
        validation_file: str,
        spec: TrainingSpec,
        *,
        seed: int,
        given_up: threading.Event | None = None,
    ) -> DatasetReport:
        """Return the report on the two files (the second may be empty) for the tenant of the present call.

        Raises:
            InvalidArgument: `invalid_dataset`.
            NotFound: `file_not_found`.
            ResourceExhausted: `dataset_too_large`.
        """
        stop = given_up or threading.Event()

        def check() -> None:
            if stop.is_set():
                raise _GivenUpError

        async with self._slots:
            with tempfile.TemporaryDirectory(
                prefix="lorafleet-check-", dir=self._settings.work_folder
            ) as folder:
                paths = []
                for file_id in filter(None, (training_file, validation_file)):
                    path = Path(folder) / file_id
                    await self._registry.download(file_id, path, max_bytes=self._settings.max_file_bytes)
                    paths.append(path)
                validation_path = paths[1] if len(paths) > 1 else None
                try:
                    return await asyncio.to_thread(
                        check_data, paths[0], validation_path, base.encoder, spec, seed=seed, check=check
                    )
                finally:
                    # The thread of a call that was cancelled must end before its files go.
                    stop.set()


class Validator:
    """Takes the jobs of the validation lane one by one: to QUEUED, or to FAILED with every bad line."""

    def __init__(
        self,
        book: JobBook,
        check: DataCheck,
        bases: BaseCatalog,
        estimator: Estimator,
        in_work: set[str],
    ) -> None:
        self._book = book
        self._check = check
        self._bases = bases
        self._estimator = estimator
        self._in_work = in_work
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Take no other job; the one in work goes back to its lane."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`."""
        while not self._stopping.is_set():
            claim = None
            try:
                claim = await self._book.claim_next(Lane.VALIDATION, passing_over=self._in_work)
                if claim is not None:
                    await self._validate(claim)
            except (StaleLeaseError, Unavailable, DeadlineExceeded) as error:
                _logger.warning("validation put off", extra={"reason": error.reason})
                await wait_for(self._stopping, RETRY_SECONDS)
            except Exception:
                _logger.exception("validation put off")
                await wait_for(self._stopping, RETRY_SECONDS)
            if claim is None:
                await wait_for(self._stopping, IDLE_SECONDS)

    async def _validate(self, claim: Claim) -> None:
        given_up = threading.Event()
        self._in_work.add(claim.job.id)
        watch = asyncio.create_task(self._watch(claim, given_up))
        try:
            await self._record(claim, given_up)
        except _GivenUpError:
            if await self._book.cancel_asked(claim.job.id):
                await self._book.append(claim, [Draft("Job cancelled", state=JobState.CANCELLED)])
        finally:
            watch.cancel()
            self._in_work.discard(claim.job.id)
            await self._book.release(claim)

    async def _record(self, claim: Claim, given_up: threading.Event) -> None:
        request = claim.job.request
        names = " and ".join(filter(None, (request.training_file, request.validation_file)))
        if claim.job.last_sequence == 1:
            await self._book.append(claim, [Draft(f"Validating training file: {names}")])
        try:
            failpoint("validate.before_read")
            base = self._bases.find(request.base_model)
            with call_scope(tenant=request.tenant, request_id=request.id), child_of(request.traceparent):
                report = await self._check.run(
                    base,
                    request.training_file,
                    request.validation_file,
                    request.spec,
                    seed=request.seed,
                    given_up=given_up,
                )
            expected = await self._estimator.of(request.spec, DataSize.of(report), base)
            require_fit(expected)
        except (_GivenUpError, Unavailable, DeadlineExceeded):
            raise
        except LorafleetError as error:
            await self._book.append(claim, [failed(JobFailure.of(error))])
            return
        except Exception:
            _logger.exception("a validation failed for a reason of ours", extra={"job": request.id})
            ours = Internal("internal", "the files could not be checked, for a reason that is not yours")
            await self._book.append(claim, [failed(JobFailure.of(ours))])
            return
        facts = Facts(dataset=report, estimate=expected)
        queued = Draft("Files validated, moving job to queued state", state=JobState.QUEUED, facts=facts)
        failpoint("validate.before_record")
        await self._book.append(claim, [*_remarks(report), queued])
        if await self._book.pause_asked(claim.job):
            await self._book.append(claim, [paused()])

    async def _watch(self, claim: Claim, given_up: threading.Event) -> None:
        """Keep the lease, and give the check up where that is lost, a cancel comes or the service stops."""
        while not given_up.is_set():
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self._book.renew(claim)
                if self._stopping.is_set() or await self._book.cancel_asked(claim.job.id):
                    given_up.set()
            except Unavailable:
                continue
            except StaleLeaseError:
                given_up.set()


def failed(failure: JobFailure) -> Draft:
    """Return the draft that ends a job as failed."""
    text = f"The job failed: {failure.message}"
    return Draft(text, level=Level.ERROR, state=JobState.FAILED, facts=Facts(failure=failure))


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Return when `event` is set or the time is up."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _remarks(report: DatasetReport) -> list[Draft]:
    """Return a warning for each thing about the data that its owner should know."""
    drafts = [
        Draft(f"{count} {text}", level=Level.WARN, data={name: float(count)})
        for name, (count, text) in report.warnings.items()
    ]
    if not report.validation_rows:
        drafts.append(Draft("No rows are held out, so nothing will be evaluated", level=Level.WARN))
    return drafts
