"""A real trainer process beside a real registry, and the calls that a client makes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceStub
from services.common.call_context import call_scope
from services.common.channels import open_channel
from services.common.server import ServiceHost
from services.common.status import from_rpc_error
from services.registry.service import SERVICES, Registry
from tests.support.registry import Client, Place

BASE = "tiny-llama"
TENANT = "acme"
FINAL = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


def prompt_rows(count: int, *, answers: int = 3) -> bytes:
    """A training file whose answers follow from the prompt: a digit is repeated."""
    rows = [
        {"prompt": f"row {i} says {i % answers}\n", "completion": f"n{i % answers}"} for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8")


@dataclass(slots=True)
class Trainer:
    """A trainer's calls for one tenant; errors come as `LorafleetError`."""

    stub: TrainerServiceStub
    registry: Client
    process: asyncio.subprocess.Process
    tenant: str = TENANT
    call_seconds: float = 30

    async def call(self, name: str, request: Any) -> Any:
        """Make a call with one answer."""
        try:
            with call_scope(tenant=self.tenant):
                return await getattr(self.stub, name)(request, timeout=self.call_seconds)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def create(
        self, data: bytes, spec: job_pb2.TrainingSpec | None = None, **fields: Any
    ) -> job_pb2.Job:
        """Upload a training file and create a job on it."""
        file = await self.registry.create_file(data)
        defaults: dict[str, Any] = {"base_model": BASE, "training_file": file.id, "spec": spec, "seed": 7}
        request = trainer_service_pb2.CreateJobRequest(**(defaults | fields))
        job: job_pb2.Job = await self.call("CreateJob", request)
        return job

    async def job(self, job_id: str) -> job_pb2.Job:
        """The job as it stands."""
        job: job_pb2.Job = await self.call("GetJob", trainer_service_pb2.GetJobRequest(job_id=job_id))
        return job

    async def cancel(self, job_id: str) -> job_pb2.Job:
        """Ask for a cancel."""
        job: job_pb2.Job = await self.call("CancelJob", trainer_service_pb2.CancelJobRequest(job_id=job_id))
        return job

    async def watch(self, job_id: str, after: str = "") -> AsyncIterator[job_pb2.JobEvent]:
        """The job's events to its end."""
        request = trainer_service_pb2.WatchJobRequest(job_id=job_id, after_event_id=after)
        try:
            with call_scope(tenant=self.tenant):
                stream: Any = self.stub.WatchJob(request, timeout=100)
            async for event in stream:
                yield event
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def past_step(self, job_id: str, step: int) -> int:
        """Return once a job has told about a step behind `step`: that step."""
        async for event in self.watch(job_id):
            if event.metrics.step > step:
                return event.metrics.step
        raise AssertionError(f"the job ended before step {step}: {await self.job(job_id)}")

    async def until(self, job_id: str, *states: int, seconds: float = 100) -> job_pb2.Job:
        """The job once it is in one of the states."""
        async with asyncio.timeout(seconds):
            while True:
                job = await self.job(job_id)
                if job.state in states:
                    return job
                assert job.state not in FINAL, job
                await asyncio.sleep(0.1)

    async def events(self, job_id: str) -> list[job_pb2.JobEvent]:
        """Every event so far, oldest first."""
        request = trainer_service_pb2.ListEventsRequest(job_id=job_id, page_size=1000)
        response = await self.call("ListEvents", request)
        return list(reversed(response.events))

    def children(self) -> list[psutil.Process]:
        """The processes that run jobs."""
        return psutil.Process(self.process.pid).children()

    def kill(self) -> None:
        """kill -9 of the service."""
        self.process.send_signal(signal.SIGKILL)

    async def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()


@dataclass(slots=True)
class TrainerPlace:
    """Where a trainer and its registry keep their things, so that either can be started again."""

    base: Path
    folder: Path
    redis_url: str
    quantization: str = "nf4"
    start_seconds: float = 60
    call_seconds: float = 30

    def environment(self, registry_target: str, port_file: Path, changes: dict[str, str]) -> dict[str, str]:
        """The environment of a trainer process."""
        own = {
            "REDIS_URL": self.redis_url,
            "STORE_URL": f"file://{self.folder / 'store'}",
            "REGISTRY_TARGET": registry_target,
            "BASES": json.dumps({BASE: str(self.base)}),
            "QUANTIZATION": self.quantization,
            "DEVICE": "cpu",
            "THREADS": "1",
            "NICENESS": "0",
            "GRACE_SECONDS": "10",
            "EVENT_INTERVAL_SECONDS": "0.1",
            "LOG_LEVEL": "WARNING",
        }
        named = {f"LORAFLEET_TRAINER_{name}": value for name, value in (own | changes).items()}
        return os.environ | named | {"LORAFLEET_PORT_FILE": str(port_file), "OMP_NUM_THREADS": "1"}


@asynccontextmanager
async def registry_host(place: TrainerPlace, *, port: int = 0) -> AsyncIterator[str]:
    """Run a registry over the place; yield its address."""
    store = Place.in_directory(place.redis_url, place.folder / "store")
    settings = store.settings(listen=f"127.0.0.1:{port}")
    host = ServiceHost(settings, SERVICES)
    registry = Registry(settings)
    await registry.register(host)
    await registry.probe()
    address = await host.start()
    try:
        yield str(address)
    finally:
        await host.stop(grace_seconds=0)


@asynccontextmanager
async def running_trainer(
    place: TrainerPlace, registry_target: str, *, module: str = "services.trainer", **changes: str
) -> AsyncIterator[Trainer]:
    """Run a trainer process over the place until the body ends; several may run at once."""
    port_file = place.folder / f"trainer-{uuid.uuid4().hex}.port"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        env=place.environment(registry_target, port_file, changes),
    )
    try:
        async with asyncio.timeout(place.start_seconds):
            address = await _address(port_file, process)
        async with open_channel(address) as channel, open_channel(registry_target) as registry_channel:
            async with asyncio.timeout(place.start_seconds):
                await _serving(channel)
            registry = Client(registry_channel, TENANT)
            stub = TrainerServiceStub(channel)
            yield Trainer(stub, registry, process, call_seconds=place.call_seconds)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def spec(**fields: Any) -> job_pb2.TrainingSpec:
    """A specification for tiny models: few steps at a high rate."""
    defaults: dict[str, Any] = {"learning_rate": 0.01, "rank": 4, "max_seq_len": 64, "n_epochs": 2}
    return job_pb2.TrainingSpec(**(defaults | fields))


def losses(events: Sequence[job_pb2.JobEvent]) -> list[float]:
    """The training losses among events."""
    return [event.metrics.loss for event in events if event.HasField("metrics")]


async def _address(port_file: Path, process: asyncio.subprocess.Process) -> str:
    while not await asyncio.to_thread(port_file.exists):
        assert process.returncode is None, f"the trainer ended with {process.returncode}"
        await asyncio.sleep(0.05)
    return (await asyncio.to_thread(port_file.read_text, "ascii")).strip()


async def _serving(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    while True:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=60, wait_for_ready=True)
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(0.05)
