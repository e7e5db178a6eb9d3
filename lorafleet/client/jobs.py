"""Fine-tuning: files in, jobs, their events, and what they made."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from lorafleet.client.connection import AnswerT, Connection
from lorafleet.inference.v1 import inference_service_pb2
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from lorafleet.registry.v1 import file_pb2
from lorafleet.registry.v1.file_pb2_grpc import FileServiceStub
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceStub

_CHUNK_BYTES = 512 * 1024
ENDED = frozenset({job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED})


class AsyncJobs:
    """A tenant's fine-tuning jobs and their data files."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = TrainerServiceStub(connection.channel)
        self._files = FileServiceStub(connection.channel)
        self._inference = InferenceServiceStub(connection.channel)

    async def upload(self, path: Path) -> file_pb2.File:
        """Upload a data file: one JSON object per line."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        header = file_pb2.CreateFileHeader(
            filename=path.name,
            purpose=file_pb2.FilePurpose.FILE_PURPOSE_FINE_TUNE,
            digest=f"sha256:{digest}",
        )
        return await self._call(self._files.CreateFile, _upload(header, path), file_pb2.File)

    async def create(
        self,
        training_file: str | Path,
        *,
        adapter: str = "",
        base: str = "",
        validation_file: str | Path = "",
        spec: job_pb2.TrainingSpec | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str = "",
    ) -> job_pb2.Job:
        """Create a job.

        Args:
            training_file: id of an uploaded file, or a path to upload.
            adapter: what the result becomes a version of; empty: the job's id.
            base: name of the base; empty: the one that is served.
            validation_file: as `training_file`; without it rows are held out.
            spec: how to train; absent fields take the defaults that the contract names.

        Raises:
            InvalidArgument: `bad_hyperparameter` and others; see `CreateJob` in the contract.
        """
        request = trainer_service_pb2.CreateJobRequest(
            base_model=base or await self._served_base(),
            training_file=await self._file_id(training_file),
            validation_file=await self._file_id(validation_file),
            adapter=adapter,
            spec=spec,
            seed=seed,
            metadata=dict(metadata or {}),
            idempotency_key=idempotency_key,
        )
        return await self._call(self._stub.CreateJob, request, job_pb2.Job)

    async def get(self, job_id: str) -> job_pb2.Job:
        """Return one job; raise `NotFound` (`job_not_found`) where there is none."""
        return await self._call(
            self._stub.GetJob, trainer_service_pb2.GetJobRequest(job_id=job_id), job_pb2.Job
        )

    async def all(
        self, *, state: job_pb2.JobState.ValueType = job_pb2.JOB_STATE_UNSPECIFIED
    ) -> list[job_pb2.Job]:
        """Return the jobs in a state, or all, newest first."""
        request = trainer_service_pb2.ListJobsRequest(state=state)
        pages = self._connection.pages(self._stub.ListJobs, request, trainer_service_pb2.ListJobsResponse)
        return [job async for page in pages for job in page.jobs]

    async def cancel(self, job_id: str) -> job_pb2.Job:
        """Ask a job to stop at its next step."""
        return await self._call(
            self._stub.CancelJob, trainer_service_pb2.CancelJobRequest(job_id=job_id), job_pb2.Job
        )

    async def pause(self, job_id: str) -> job_pb2.Job:
        """Ask a job to stop at its next step and keep a checkpoint."""
        return await self._call(
            self._stub.PauseJob, trainer_service_pb2.PauseJobRequest(job_id=job_id), job_pb2.Job
        )

    async def resume(self, job_id: str) -> job_pb2.Job:
        """Let a paused job go on."""
        return await self._call(
            self._stub.ResumeJob, trainer_service_pb2.ResumeJobRequest(job_id=job_id), job_pb2.Job
        )

    async def events(self, job_id: str, *, after: str = "") -> AsyncIterator[job_pb2.JobEvent]:
        """Yield the events after the one with the id `after`, and live ones until the job has ended."""
        request = trainer_service_pb2.WatchJobRequest(job_id=job_id, after_event_id=after)
        async for event in self._connection.stream(self._stub.WatchJob, request):
            yield event

    async def past_events(self, job_id: str) -> list[job_pb2.JobEvent]:
        """Return the events so far, oldest first."""
        request = trainer_service_pb2.ListEventsRequest(job_id=job_id, page_size=1000)
        pages = self._connection.pages(self._stub.ListEvents, request, trainer_service_pb2.ListEventsResponse)
        return [event async for page in pages for event in page.events][::-1]

    async def wait(self, job_id: str) -> job_pb2.Job:
        """Return the job once it has ended, in whatever way."""
        async for _ in self.events(job_id):
            pass
        return await self.get(job_id)

    async def checkpoints(self, job_id: str) -> list[job_pb2.Checkpoint]:
        """Return a job's checkpoints, newest first."""
        request = trainer_service_pb2.ListCheckpointsRequest(job_id=job_id)
        pages = self._connection.pages(
            self._stub.ListCheckpoints, request, trainer_service_pb2.ListCheckpointsResponse
        )
        return [checkpoint async for page in pages for checkpoint in page.checkpoints]

    async def publish_checkpoint(
        self, job_id: str, checkpoint_id: str, *, adapter: str = ""
    ) -> job_pb2.Checkpoint:
        """Publish a checkpoint as a version of `adapter`, empty: the job's; return it with its model name.

        The same checkpoint and adapter give the same version: a call that ran out of time may be made again.

        Raises:
            FailedPrecondition: `checkpoint_discarded`; the last two checkpoints of a job are kept. Or
                `parity_failed`, where what is served is not what was trained.
        """
        request = trainer_service_pb2.PublishCheckpointRequest(
            job_id=job_id, checkpoint_id=checkpoint_id, adapter=adapter
        )
        return await self._call(self._stub.PublishCheckpoint, request, job_pb2.Checkpoint)

    async def _file_id(self, file: str | Path) -> str:
        return str((await self.upload(file)).id) if isinstance(file, Path) else file

    async def _served_base(self) -> str:
        status = await self._call(
            self._inference.GetStatus,
            inference_service_pb2.GetStatusRequest(),
            inference_service_pb2.EngineStatus,
        )
        return str(status.base_model)

    async def _call(self, method: Any, request: Any, answer: type[AnswerT]) -> AnswerT:
        return await self._connection.call(method, request, answer)


async def _upload(header: file_pb2.CreateFileHeader, path: Path) -> AsyncIterator[file_pb2.CreateFileRequest]:
    yield file_pb2.CreateFileRequest(header=header)
    with path.open("rb") as file:
        while data := file.read(_CHUNK_BYTES):
            yield file_pb2.CreateFileRequest(data=data)
