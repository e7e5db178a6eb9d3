"""`/v1/fine_tuning/jobs`."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import grpc
from fastapi import APIRouter, Depends, Header, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorafleet.trainer.v1.job_pb2 import JobEvent
from lorafleet.trainer.v1.trainer_service_pb2 import (
    CancelJobRequest,
    GetJobRequest,
    ListCheckpointsRequest,
    ListEventsRequest,
    ListJobsRequest,
    PauseJobRequest,
    PublishCheckpointRequest,
    ResumeJobRequest,
    WatchJobRequest,
)
from services.common.errors import InvalidArgument
from services.gateway.auth import requires
from services.gateway.errors import from_upstream
from services.gateway.job_object import checkpoint_object, event_object, job_object
from services.gateway.job_request import FIELDS, JobRequest, Suffix
from services.gateway.json_body import Body, json_body
from services.gateway.keys import Scope
from services.gateway.paging import all_items, page_after, page_size
from services.gateway.sse import EventStream
from services.gateway.state import gateway_of
from services.gateway.upstream_fields import in_http_terms

router = APIRouter(prefix="/v1/fine_tuning/jobs", dependencies=[Depends(requires(Scope.FINE_TUNING))])

MAX_LIMIT = 1000
_METADATA = re.compile(r"metadata\[(.{1,64})\]")

Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]
Pairs = Annotated[str | None, Query(description="One `metadata[key]=value` for each key; never whole.")]


class CheckpointPublication(Body):
    """What a checkpoint becomes a version of; without `suffix` that is the job's adapter."""

    suffix: Suffix | None = None


@router.post("")
async def create_job(
    request: Request,
    body: Annotated[JobRequest, Depends(json_body(JobRequest))],
    idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, Any]:
    """Create a job; the same `Idempotency-Key` with the same body returns the first one again."""
    trainer = gateway_of(request).upstream.trainer
    try:
        job = await trainer.CreateJob(body.create_request(idempotency_key))
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), FIELDS) from error
    return job_object(job, request.state.tenant)


@router.get("")
async def list_jobs(
    request: Request, limit: Limit = 20, after: str | None = None, metadata: Pairs = None
) -> dict[str, Any]:
    """List the tenant's jobs, newest first; `metadata[key]=value` keeps those that have the pair."""
    ask = ListJobsRequest(page_size=page_size(after, limit), metadata=_metadata_filter(request, metadata))
    jobs = all_items(gateway_of(request).upstream.trainer.ListJobs, ask, lambda answer: answer.jobs)
    page = await page_after(jobs, lambda job: job.id, after=after, limit=limit)
    return page.object(lambda job: job_object(job, request.state.tenant))


@router.get("/{job_id}")
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    """Return one job."""
    job = await gateway_of(request).upstream.trainer.GetJob(GetJobRequest(job_id=job_id))
    return job_object(job, request.state.tenant)


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """Ask a job to stop."""
    job = await gateway_of(request).upstream.trainer.CancelJob(CancelJobRequest(job_id=job_id))
    return job_object(job, request.state.tenant)


@router.post("/{job_id}/pause")
async def pause_job(request: Request, job_id: str) -> dict[str, Any]:
    """Ask a job to stop until it is resumed."""
    job = await gateway_of(request).upstream.trainer.PauseJob(PauseJobRequest(job_id=job_id))
    return job_object(job, request.state.tenant)


@router.post("/{job_id}/resume")
async def resume_job(request: Request, job_id: str) -> dict[str, Any]:
    """Let a paused job go on."""
    job = await gateway_of(request).upstream.trainer.ResumeJob(ResumeJobRequest(job_id=job_id))
    return job_object(job, request.state.tenant)


@router.get("/{job_id}/events")
async def list_events(
    request: Request, job_id: str, limit: Limit = 20, after: str | None = None, stream: bool = False
) -> Response:
    """List a job's events, newest first.

    With `stream` they come as server-sent events instead, oldest first from after `after` on, until the job
    ends; `limit` has no meaning then.
    """
    gateway = gateway_of(request)
    if stream:
        await gateway.upstream.trainer.GetJob(GetJobRequest(job_id=job_id))
        call = gateway.upstream.trainer.WatchJob(
            WatchJobRequest(job_id=job_id, after_event_id=after or ""),
            timeout=gateway.settings.stream_timeout_seconds,
        )
        return EventStream(_event_objects(aiter(call)), on_close=call.cancel, check=request.state.key_check)
    ask = ListEventsRequest(job_id=job_id, page_size=page_size(after, limit))
    events = all_items(gateway.upstream.trainer.ListEvents, ask, lambda answer: answer.events)
    page = await page_after(events, lambda event: event.id, after=after, limit=limit)
    return JSONResponse(page.object(event_object))


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    request: Request, job_id: str, limit: Limit = 10, after: str | None = None
) -> dict[str, Any]:
    """List a job's checkpoints, newest first."""
    ask = ListCheckpointsRequest(job_id=job_id, page_size=page_size(after, limit))
    checkpoints = all_items(
        gateway_of(request).upstream.trainer.ListCheckpoints, ask, lambda answer: answer.checkpoints
    )
    page = await page_after(checkpoints, lambda checkpoint: checkpoint.id, after=after, limit=limit)
    return page.object(checkpoint_object)


@router.post("/{job_id}/checkpoints/{checkpoint_id}/publish")
async def publish_checkpoint(
    request: Request,
    job_id: str,
    checkpoint_id: str,
    body: Annotated[CheckpointPublication, Depends(json_body(CheckpointPublication))],
) -> dict[str, Any]:
    """Publish a checkpoint as a version of an adapter; the same again gives the same version."""
    ask = PublishCheckpointRequest(job_id=job_id, checkpoint_id=checkpoint_id, adapter=body.suffix or "")
    try:
        checkpoint = await gateway_of(request).upstream.trainer.PublishCheckpoint(ask)
    except grpc.RpcError as error:
        raise in_http_terms(from_upstream(error), FIELDS) from error
    return checkpoint_object(checkpoint)


async def _event_objects(events: AsyncIterator[JobEvent]) -> AsyncGenerator[dict[str, Any]]:
    async for event in events:
        yield event_object(event)


def _metadata_filter(request: Request, whole: str | None) -> dict[str, str]:
    if whole is not None:
        raise InvalidArgument(
            "unsupported_parameter", "filter by metadata[key]=value; null is not supported", field="metadata"
        )
    pairs = {}
    for name, value in request.query_params.items():
        if match := _METADATA.fullmatch(name):
            pairs[match[1]] = value
    return pairs
