"""TrainerService over gRPC: check, call, translate, return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceServicer
from services.common.call_context import current_tenant
from services.common.errors import NotFound
from services.common.names import adapter_name
from services.trainer.book import JobBook
from services.trainer.checkpoint_publisher import CheckpointPublisher
from services.trainer.conversion import (
    STATES,
    checkpoint_to_proto,
    event_to_proto,
    job_to_proto,
    method_to_proto,
    report_to_proto,
)
from services.trainer.estimate import require_fit
from services.trainer.estimator import Estimator
from services.trainer.index import JobView
from services.trainer.job import Checkpoint, Job, Publication, check_job_id, event_sequence
from services.trainer.methods import METHODS
from services.trainer.pages import decode_number, decode_token, encode_token, page_size
from services.trainer.requests import RequestChecker
from services.trainer.validator import DataCheck

WATCH_SECONDS = 0.2
_WATCH_ROWS = 500
_JOBS, _EVENTS, _CHECKPOINTS = "jobs", "events", "checkpoints"

Context = grpc.aio.ServicerContext[Any, Any]


class TrainerServicer(TrainerServiceServicer):
    """Jobs of the calling tenant."""

    def __init__(
        self,
        book: JobBook,
        checker: RequestChecker,
        check: DataCheck,
        estimator: Estimator,
        publisher: CheckpointPublisher,
    ) -> None:
        self._book = book
        self._checker = checker
        self._check = check
        self._estimator = estimator
        self._publisher = publisher

    async def CreateJob(  # noqa: N802
        self, request: trainer_service_pb2.CreateJobRequest, context: Context
    ) -> job_pb2.Job:
        asked, base = await self._checker.job_request(request, current_tenant())
        expected = await self._estimator.at_first_sight(
            asked.spec, asked.training_file, base, holds_out=not asked.validation_file
        )
        if expected is not None:
            require_fit(expected)
        await self._book.ensure_indexed()
        message = f"Created fine-tuning job: {asked.id}"
        job = await self._book.create(asked, message=message, estimate=expected)
        return job_to_proto(JobView(job, cancel_asked=False))

    async def GetJob(  # noqa: N802
        self, request: trainer_service_pb2.GetJobRequest, context: Context
    ) -> job_pb2.Job:
        return job_to_proto(await self._find(request.job_id))

    async def ListJobs(  # noqa: N802
        self, request: trainer_service_pb2.ListJobsRequest, context: Context
    ) -> trainer_service_pb2.ListJobsResponse:
        before = decode_token(_JOBS, request.page_token)
        pairs = dict(request.metadata)

        def matches(view: JobView) -> bool:
            has_pairs = pairs.items() <= view.job.request.metadata.items()
            return has_pairs and request.state in (job_pb2.JOB_STATE_UNSPECIFIED, STATES[view.state])

        found, more = await self._book.newest(
            current_tenant(), before=before, limit=page_size(request.page_size), matches=matches
        )
        return trainer_service_pb2.ListJobsResponse(
            jobs=[job_to_proto(view) for view in found],
            next_page_token=encode_token(_JOBS, found[-1].job.id) if more else "",
        )

    async def CancelJob(  # noqa: N802
        self, request: trainer_service_pb2.CancelJobRequest, context: Context
    ) -> job_pb2.Job:
        return job_to_proto(await self._book.ask_cancel(current_tenant(), check_job_id(request.job_id)))

    async def PauseJob(  # noqa: N802
        self, request: trainer_service_pb2.PauseJobRequest, context: Context
    ) -> job_pb2.Job:
        return job_to_proto(await self._book.ask_pause(current_tenant(), check_job_id(request.job_id)))

    async def ResumeJob(  # noqa: N802
        self, request: trainer_service_pb2.ResumeJobRequest, context: Context
    ) -> job_pb2.Job:
        return job_to_proto(await self._book.resume(current_tenant(), check_job_id(request.job_id)))

    async def WatchJob(  # noqa: N802
        self, request: trainer_service_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[job_pb2.JobEvent]:
        job = (await self._find(request.job_id)).job
        seen = event_sequence(job.id, request.after_event_id) if request.after_event_id else 0
        if seen > job.last_sequence:
            raise NotFound("event_not_found", "the job has no such event", field="after_event_id")
        while True:
            records = await self._book.records(job, seen + 1, seen + _WATCH_ROWS)
            for record in records:
                yield event_to_proto(job.id, record)
                seen = record.sequence
            if records:
                continue
            job = (await self._find(job.id)).job
            if seen >= job.last_sequence:
                if job.state.is_final:
                    return
                await asyncio.sleep(WATCH_SECONDS)

    async def ListEvents(  # noqa: N802
        self, request: trainer_service_pb2.ListEventsRequest, context: Context
    ) -> trainer_service_pb2.ListEventsResponse:
        job = (await self._find(request.job_id)).job
        size = page_size(request.page_size)
        before = decode_number(_EVENTS, request.page_token) or job.last_sequence + 1
        first = max(1, before - size)
        records = await self._book.records(job, first, before - 1)
        return trainer_service_pb2.ListEventsResponse(
            events=[event_to_proto(job.id, record) for record in reversed(records)],
            next_page_token=encode_token(_EVENTS, str(first)) if first > 1 else "",
        )

    async def ListCheckpoints(  # noqa: N802
        self, request: trainer_service_pb2.ListCheckpointsRequest, context: Context
    ) -> trainer_service_pb2.ListCheckpointsResponse:
        job = (await self._find(request.job_id)).job
        size = page_size(request.page_size)
        start = decode_number(_CHECKPOINTS, request.page_token) or 0
        newest = job.checkpoints[::-1]
        # Counted from the oldest, so that checkpoints made between two pages shift nothing.
        skipped = len(newest) - start if start else 0
        page = newest[skipped : skipped + size]
        rest = len(newest) - skipped - len(page)
        publications = await self._book.publications(job)
        return trainer_service_pb2.ListCheckpointsResponse(
            checkpoints=[_checkpoint(job, each, publications) for each in page],
            next_page_token=encode_token(_CHECKPOINTS, str(rest)) if rest else "",
        )

    async def PublishCheckpoint(  # noqa: N802
        self, request: trainer_service_pb2.PublishCheckpointRequest, context: Context
    ) -> job_pb2.Checkpoint:
        job = (await self._find(request.job_id)).job
        checkpoint = job.checkpoint(request.checkpoint_id)
        adapter = adapter_name(request.adapter) if request.adapter else job.request.adapter
        model = await self._publisher.publish(job, checkpoint, adapter)
        message = _checkpoint(job, checkpoint, await self._book.publications(job))
        message.fine_tuned_model = model
        return message

    async def ValidateDataset(  # noqa: N802
        self, request: trainer_service_pb2.ValidateDatasetRequest, context: Context
    ) -> job_pb2.DatasetReport:
        base, spec = await self._checker.dataset_request(request)
        report = await self._check.run(base, request.training_file, request.validation_file, spec, seed=0)
        return report_to_proto(report)

    async def ListMethods(  # noqa: N802
        self, request: trainer_service_pb2.ListMethodsRequest, context: Context
    ) -> trainer_service_pb2.ListMethodsResponse:
        return trainer_service_pb2.ListMethodsResponse(
            methods=[method_to_proto(method) for method in METHODS.values()]
        )

    async def _find(self, job_id: str) -> JobView:
        return await self._book.get(current_tenant(), check_job_id(job_id))


def _checkpoint(job: Job, checkpoint: Checkpoint, publications: Sequence[Publication]) -> job_pb2.Checkpoint:
    """Return a checkpoint with what came of publishing it, `publications` of any checkpoint, oldest first."""
    own = [each for each in publications if each.checkpoint_id == checkpoint.id]
    models = [each.fine_tuned_model for each in own if each.fine_tuned_model]
    reports = [each.report for each in own if each.report is not None]
    return checkpoint_to_proto(
        job.id,
        checkpoint,
        fine_tuned_model=checkpoint.fine_tuned_model or (models[-1] if models else ""),
        report=reports[-1] if reports else None,
    )
