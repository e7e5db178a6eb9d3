"""A trainer service whose jobs end when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from lorafleet.registry.v1 import adapter_pb2 as reg
from lorafleet.trainer.v1 import job_pb2 as job
from lorafleet.trainer.v1 import trainer_service_pb2 as trn
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceServicer
from services.common.call_context import current_tenant
from services.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from services.common.ids import new_id
from services.common.names import adapter_name
from tests.support.fake_base import BASE, Context, now


class FakeTrainer(TrainerServiceServicer):
    """Jobs in memory; a test moves them along by hand."""

    def __init__(self, has_file: Callable[[str, str], bool]) -> None:
        self._has_file = has_file
        self.jobs: dict[str, job.Job] = {}
        self.tenants: dict[str, str] = {}
        self.events: dict[str, list[job.JobEvent]] = {}
        self.checkpoints: dict[str, list[job.Checkpoint]] = {}
        self.requests: list[trn.CreateJobRequest] = []
        self.watching = 0
        self._keys: dict[str, tuple[bytes, str]] = {}

    def add_event(self, job_id: str, message: str, **fields: Any) -> job.JobEvent:
        """Append an event to a job."""
        events = self.events[job_id]
        fields.setdefault("level", job.EventLevel.EVENT_LEVEL_INFO)
        made = job.JobEvent(
            id=f"ftevent-{job_id.removeprefix('ftjob-')}-{len(events):06d}",
            job_id=job_id,
            create_time=now(),
            message=message,
            **fields,
        )
        events.append(made)
        return made

    def succeed(self, job_id: str, version: reg.AdapterVersion) -> None:
        """End a job well, with a version as its result."""
        made = self.jobs[job_id]
        made.state = job.JobState.JOB_STATE_SUCCEEDED
        made.end_time.CopyFrom(now())
        made.trained_tokens = 1234
        made.result.CopyFrom(
            job.JobResult(
                adapter=version.adapter,
                version=version.version,
                digest=version.digest,
                fine_tuned_model=f"ft:{BASE}:{self.tenants[job_id]}:{version.adapter}:v{version.version}",
                result_files=["file-results"],
                evaluation=[
                    job.EvaluationMetric(name="exact_match", base_value=0.1, adapter_value=0.9, rows=50)
                ],
            )
        )
        self.add_event(job_id, "The job has succeeded", state=job.JobState.JOB_STATE_SUCCEEDED)

    async def CreateJob(self, request: trn.CreateJobRequest, context: Context) -> job.Job:
        self.requests.append(request)
        body = request.SerializeToString(deterministic=True)
        if request.idempotency_key in self._keys:
            known_body, job_id = self._keys[request.idempotency_key]
            if known_body != body:
                raise FailedPrecondition("idempotency_key_reused", "the key belongs to another request")
            return self.jobs[job_id]
        if request.base_model != BASE:
            raise NotFound("base_not_found", "no such base", field="base_model")
        if request.spec.HasField("rank") and not 1 <= request.spec.rank <= 256:
            raise InvalidArgument(
                "bad_hyperparameter", "rank must be 1 to 256", field="spec.rank", limit="1-256"
            )
        if not self._has_file(current_tenant(), request.training_file):
            raise NotFound("file_not_found", "no such file", field="training_file")
        made = job.Job(
            id=new_id("ftjob"),
            state=job.JobState.JOB_STATE_QUEUED,
            base_model=request.base_model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            spec=request.spec,
            seed=request.seed,
            metadata=request.metadata,
            create_time=now(),
        )
        made.adapter = request.adapter or made.id
        self.jobs[made.id] = made
        self.tenants[made.id] = current_tenant()
        self.events[made.id] = []
        self.checkpoints[made.id] = []
        if request.idempotency_key:
            self._keys[request.idempotency_key] = (body, made.id)
        self.add_event(made.id, "Created", state=made.state)
        return made

    async def GetJob(self, request: trn.GetJobRequest, context: Context) -> job.Job:
        return self._job(request.job_id)

    async def ListJobs(self, request: trn.ListJobsRequest, context: Context) -> trn.ListJobsResponse:
        own = [made for made in self.jobs.values() if self.tenants[made.id] == current_tenant()]
        wanted = [made for made in own[::-1] if request.metadata.items() <= made.metadata.items()]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        return trn.ListJobsResponse(
            jobs=wanted[start:end], next_page_token=str(end) if end < len(wanted) else ""
        )

    async def CancelJob(self, request: trn.CancelJobRequest, context: Context) -> job.Job:
        made = self._job(request.job_id)
        if made.state == job.JobState.JOB_STATE_SUCCEEDED:
            raise FailedPrecondition("already_finished", "the job has ended", resource=f"jobs/{made.id}")
        made.state = job.JobState.JOB_STATE_CANCELLED
        made.end_time.CopyFrom(now())
        self.add_event(made.id, "Cancelled", state=made.state)
        return made

    async def PauseJob(self, request: trn.PauseJobRequest, context: Context) -> job.Job:
        made = self._job(request.job_id)
        if made.state != job.JobState.JOB_STATE_QUEUED:
            raise FailedPrecondition("already_finished", "the job has ended", resource=f"jobs/{made.id}")
        made.state = job.JobState.JOB_STATE_PAUSED
        return made

    async def ResumeJob(self, request: trn.ResumeJobRequest, context: Context) -> job.Job:
        made = self._job(request.job_id)
        if made.state != job.JobState.JOB_STATE_PAUSED:
            raise FailedPrecondition("not_paused", "the job is not paused", resource=f"jobs/{made.id}")
        made.state = job.JobState.JOB_STATE_QUEUED
        return made

    async def WatchJob(self, request: trn.WatchJobRequest, context: Context) -> AsyncIterator[job.JobEvent]:
        made = self._job(request.job_id)
        events = self.events[made.id]
        ids = [event.id for event in events]
        if request.after_event_id and request.after_event_id not in ids:
            raise NotFound("event_not_found", "no such event", field="after_event_id")
        position = ids.index(request.after_event_id) + 1 if request.after_event_id else 0
        self.watching += 1
        try:
            while True:
                for event in events[position:]:
                    yield event
                position = len(events)
                if made.state >= job.JobState.JOB_STATE_SUCCEEDED:
                    return
                await asyncio.sleep(0.01)
        finally:
            self.watching -= 1

    async def ListEvents(self, request: trn.ListEventsRequest, context: Context) -> trn.ListEventsResponse:
        events = self.events[self._job(request.job_id).id][::-1]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        return trn.ListEventsResponse(
            events=events[start:end], next_page_token=str(end) if end < len(events) else ""
        )

    async def ListCheckpoints(
        self, request: trn.ListCheckpointsRequest, context: Context
    ) -> trn.ListCheckpointsResponse:
        return trn.ListCheckpointsResponse(checkpoints=self.checkpoints[self._job(request.job_id).id][::-1])

    async def PublishCheckpoint(
        self, request: trn.PublishCheckpointRequest, context: Context
    ) -> job.Checkpoint:
        made = self._job(request.job_id)
        adapter = adapter_name(request.adapter or made.adapter)
        for checkpoint in self.checkpoints[made.id]:
            if checkpoint.id == request.checkpoint_id:
                checkpoint.fine_tuned_model = f"ft:{BASE}:{current_tenant()}:{adapter}:v1"
                return checkpoint
        raise NotFound("checkpoint_not_found", "no such checkpoint", field="checkpoint_id")

    def _job(self, job_id: str) -> job.Job:
        if self.tenants.get(job_id) != current_tenant():
            raise NotFound("job_not_found", "no such job", resource=f"jobs/{job_id[:80]}")
        return self.jobs[job_id]
