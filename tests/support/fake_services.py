"""Small services for tests of the gateway: files and aliases in memory, scripted answers and jobs.

They keep to the contract as far as the gateway sees it, and record what they were asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from lorafleet.inference.v1 import generation_pb2 as gen
from lorafleet.inference.v1 import inference_service_pb2 as inf
from lorafleet.inference.v1.inference_service_pb2_grpc import InferenceServiceServicer
from lorafleet.registry.v1 import adapter_pb2 as reg
from lorafleet.registry.v1 import base_model_pb2 as bases
from lorafleet.registry.v1 import file_pb2 as files
from lorafleet.registry.v1.adapter_pb2_grpc import AdapterServiceServicer
from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceServicer
from lorafleet.registry.v1.file_pb2_grpc import FileServiceServicer
from lorafleet.trainer.v1 import job_pb2 as job
from lorafleet.trainer.v1 import trainer_service_pb2 as trn
from lorafleet.trainer.v1.trainer_service_pb2_grpc import TrainerServiceServicer
from services.common.call_context import current_tenant
from services.common.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    LorafleetError,
    NotFound,
    ResourceExhausted,
)
from services.common.ids import new_id
from services.common.names import AdapterRef, adapter_name

BASE = "tiny-base"
FINGERPRINT = "sha256:" + "b" * 64
BASE_CREATED = 1_700_000_000

Context = grpc.aio.ServicerContext[Any, Any]


def now() -> Timestamp:
    """The present, in whole seconds."""
    return Timestamp(seconds=int(time.time()))


def digest_of(*parts: object) -> str:
    """A digest over the texts of `parts`."""
    return "sha256:" + hashlib.sha256(repr(parts).encode()).hexdigest()


class FakeBases(BaseModelServiceServicer):
    """The one base that is registered."""

    async def GetBaseModel(self, request: bases.GetBaseModelRequest, context: Context) -> bases.BaseModel:
        assert request.name == BASE
        quantization = bases.Quantization(compute_dtype="bfloat16")
        return bases.BaseModel(
            name=BASE,
            create_time=Timestamp(seconds=BASE_CREATED),
            fingerprint=bases.Fingerprint(digest=FINGERPRINT, quantization=quantization),
        )


class FakeFiles(FileServiceServicer):
    """Files by tenant and id, in memory."""

    def __init__(self, limit_bytes: int = 1 << 20) -> None:
        self.stored: dict[tuple[str, str], tuple[files.File, bytes]] = {}
        self.open: dict[tuple[str, str], tuple[files.StartUploadRequest, bytearray]] = {}
        self.limit_bytes = limit_bytes
        self.largest_message_bytes = 0

    async def CreateFile(
        self, request_iterator: AsyncIterator[files.CreateFileRequest], context: Context
    ) -> files.File:
        header, data = None, b""
        async for request in request_iterator:
            self.largest_message_bytes = max(self.largest_message_bytes, request.ByteSize())
            if request.WhichOneof("message") == "header":
                header = request.header
            data += request.data
            if len(data) > self.limit_bytes:
                raise ResourceExhausted("too_large", "the file is too large")
        assert header is not None
        if not data:
            raise InvalidArgument("empty_file", "the file is empty", field="data")
        if header.digest != "sha256:" + hashlib.sha256(data).hexdigest():
            raise InvalidArgument("digest_mismatch", "the bytes have another digest")
        made = files.File(
            id=new_id("file"),
            filename=header.filename,
            purpose=header.purpose,
            size_bytes=len(data),
            digest=header.digest,
            create_time=now(),
        )
        self.stored[current_tenant(), made.id] = (made, data)
        return made

    async def GetFile(self, request: files.GetFileRequest, context: Context) -> files.File:
        return self._entry(request.file_id)[0]

    async def ListFiles(self, request: files.ListFilesRequest, context: Context) -> files.ListFilesResponse:
        own = [made for (tenant, _), (made, _) in self.stored.items() if tenant == current_tenant()]
        wanted = [made for made in reversed(own) if request.purpose in (0, made.purpose)]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        token = str(end) if end < len(wanted) else ""
        return files.ListFilesResponse(files=wanted[start:end], next_page_token=token)

    async def DownloadFile(
        self, request: files.DownloadFileRequest, context: Context
    ) -> AsyncIterator[files.DownloadFileResponse]:
        data = self._entry(request.file_id)[1]
        for offset in range(0, len(data), 1000):
            yield files.DownloadFileResponse(offset=offset, data=data[offset : offset + 1000])

    async def DeleteFile(
        self, request: files.DeleteFileRequest, context: Context
    ) -> files.DeleteFileResponse:
        self._entry(request.file_id)
        del self.stored[current_tenant(), request.file_id]
        return files.DeleteFileResponse()

    async def StartUpload(self, request: files.StartUploadRequest, context: Context) -> files.Upload:
        if request.size_bytes > self.limit_bytes:
            raise ResourceExhausted("too_large", "the file is too large", field="size_bytes")
        upload_id = new_id("upload")
        self.open[current_tenant(), upload_id] = request, bytearray()
        end = Timestamp(seconds=int(time.time()) + 3600)
        return files.Upload(id=upload_id, size_bytes=request.size_bytes, expire_time=end)

    async def AppendUpload(
        self, request_iterator: AsyncIterator[files.AppendUploadRequest], context: Context
    ) -> files.Upload:
        async for request in request_iterator:
            started, data = self._open(request.upload_id)
            assert data[request.offset : request.offset + len(request.data)] in (b"", request.data)
            data[request.offset :] = request.data
        return files.Upload(id=request.upload_id, committed_bytes=len(data), size_bytes=started.size_bytes)

    async def CompleteUpload(self, request: files.CompleteUploadRequest, context: Context) -> files.File:
        file_id = "file-" + request.upload_id.removeprefix("upload-")
        if (current_tenant(), file_id) in self.stored:
            return self.stored[current_tenant(), file_id][0]
        started, data = self._open(request.upload_id)
        assert len(data) == started.size_bytes
        assert request.digest == "sha256:" + hashlib.sha256(data).hexdigest()
        made = files.File(
            id=file_id,
            filename=started.header.filename,
            purpose=started.header.purpose,
            size_bytes=len(data),
            digest=request.digest,
            create_time=now(),
        )
        self.stored[current_tenant(), file_id] = (made, bytes(data))
        del self.open[current_tenant(), request.upload_id]
        return made

    async def CancelUpload(
        self, request: files.CancelUploadRequest, context: Context
    ) -> files.CancelUploadResponse:
        self._open(request.upload_id)
        del self.open[current_tenant(), request.upload_id]
        return files.CancelUploadResponse()

    def _open(self, upload_id: str) -> tuple[files.StartUploadRequest, bytearray]:
        entry = self.open.get((current_tenant(), upload_id))
        if entry is None:
            raise NotFound("upload_not_found", "no such upload", field="upload_id")
        return entry

    def _entry(self, file_id: str) -> tuple[files.File, bytes]:
        entry = self.stored.get((current_tenant(), file_id))
        if entry is None:
            raise NotFound("file_not_found", "no such file", resource=f"files/{file_id[:80]}")
        return entry


class FakeAdapters(AdapterServiceServicer):
    """Adapter versions and aliases by tenant, in memory."""

    def __init__(self) -> None:
        self.adapters: dict[tuple[str, str], reg.Adapter] = {}
        self.versions: dict[tuple[str, str], list[reg.AdapterVersion]] = {}
        self.history: dict[tuple[str, str, str], list[reg.Alias]] = {}
        self.resolved: list[str] = []
        self.contents: dict[str, dict[str, bytes]] = {}

    def publish(
        self, name: str, *, tenant: str = "default", fingerprint: str = FINGERPRINT
    ) -> reg.AdapterVersion:
        """Add the next version of an adapter."""
        versions = self.versions.setdefault((tenant, name), [])
        version = reg.AdapterVersion(
            adapter=name,
            version=len(versions) + 1,
            digest=digest_of(tenant, name, len(versions) + 1),
            state=reg.VersionState.VERSION_STATE_READY,
            base_fingerprint_digest=fingerprint,
            base_model=BASE,
            create_time=now(),
        )
        versions.append(version)
        adapter = self.adapters.setdefault(
            (tenant, name), reg.Adapter(name=name, create_time=version.create_time)
        )
        adapter.latest_version.CopyFrom(version)
        adapter.num_versions = len(versions)
        return version

    def point(self, name: str, alias: str, version: int, *, tenant: str = "default") -> reg.Alias:
        """Move an alias."""
        moves = self.history.setdefault((tenant, name, alias), [])
        moved = reg.Alias(
            adapter=name,
            name=alias,
            version=version,
            digest=self.versions[tenant, name][version - 1].digest,
            generation=len(moves) + 1,
            update_time=now(),
        )
        moves.append(moved)
        adapter = self.adapters[tenant, name]
        kept = [other for other in adapter.aliases if other.name != alias]
        del adapter.aliases[:]
        adapter.aliases.extend([*kept, moved])
        return moved

    def resolve(self, text: str, tenant: str) -> reg.AdapterVersion:
        """Return the version that a reference names now."""
        ref = AdapterRef.parse(text, field="ref")
        versions = self.versions.get((tenant, ref.name))
        if not versions:
            raise NotFound("adapter_not_found", "no such adapter", field="ref")
        if ref.alias is not None:
            moves = self.history.get((tenant, ref.name, ref.alias))
            if not moves:
                raise NotFound("alias_not_found", "no such alias", field="ref")
            return versions[moves[-1].version - 1]
        if ref.version is None and ref.digest is None:
            return versions[-1]
        for version in versions:
            if ref.version == version.version or ref.digest == version.digest:
                return version
        raise NotFound("version_not_found", "no such version", field="ref")

    async def ResolveVersion(
        self, request: reg.ResolveVersionRequest, context: Context
    ) -> reg.AdapterVersion:
        self.resolved.append(request.ref)
        return self.resolve(request.ref, current_tenant())

    async def GetAdapter(self, request: reg.GetAdapterRequest, context: Context) -> reg.Adapter:
        return self._adapter(request.adapter)

    async def ListAdapters(
        self, request: reg.ListAdaptersRequest, context: Context
    ) -> reg.ListAdaptersResponse:
        own = [entry for (tenant, _), entry in sorted(self.adapters.items()) if tenant == current_tenant()]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        token = str(end) if end < len(own) else ""
        return reg.ListAdaptersResponse(adapters=own[start:end], next_page_token=token)

    async def ListVersions(
        self, request: reg.ListVersionsRequest, context: Context
    ) -> reg.ListVersionsResponse:
        self._adapter(request.adapter)
        versions = self.versions[current_tenant(), request.adapter]
        return reg.ListVersionsResponse(versions=versions[::-1])

    async def ListAliases(self, request: reg.ListAliasesRequest, context: Context) -> reg.ListAliasesResponse:
        return reg.ListAliasesResponse(aliases=self._adapter(request.adapter).aliases)

    async def SetAlias(self, request: reg.SetAliasRequest, context: Context) -> reg.Alias:
        self.resolve(f"{request.adapter}:{request.version}", current_tenant())
        moves = self.history.get((current_tenant(), request.adapter, request.alias), [])
        if request.HasField("expected_generation") and request.expected_generation != len(moves):
            raise Aborted("alias_conflict", "somebody else moved the alias", final=True)
        return self.point(request.adapter, request.alias, request.version, tenant=current_tenant())

    async def RollbackAlias(self, request: reg.RollbackAliasRequest, context: Context) -> reg.Alias:
        moves = self.history.get((current_tenant(), request.adapter, request.alias), [])
        if not moves:
            raise NotFound("alias_not_found", "no such alias", field="alias")
        if len(moves) < 2:
            raise FailedPrecondition("no_previous_version", "the alias never moved")
        return self.point(request.adapter, request.alias, moves[-2].version, tenant=current_tenant())

    async def ListAliasHistory(
        self, request: reg.ListAliasHistoryRequest, context: Context
    ) -> reg.ListAliasHistoryResponse:
        moves = self.history.get((current_tenant(), request.adapter, request.alias), [])
        return reg.ListAliasHistoryResponse(moves=moves[::-1])

    async def PublishVersion(
        self, request_iterator: AsyncIterator[reg.PublishVersionRequest], context: Context
    ) -> reg.AdapterVersion:
        header, files = reg.PublishVersionHeader(), dict[str, bytes]()
        async for request in request_iterator:
            if request.WhichOneof("message") == "header":
                header = request.header
            else:
                files[request.chunk.file] = files.get(request.chunk.file, b"") + request.chunk.data
        adapter_name(header.adapter)
        for file in header.files:
            assert file.digest == "sha256:" + hashlib.sha256(files[file.name]).hexdigest()
        made = self.publish(
            header.adapter, tenant=current_tenant(), fingerprint=header.base_fingerprint_digest
        )
        made.files.extend(header.files)
        made.card.CopyFrom(header.card)
        self.contents[made.digest] = files
        return made

    async def DownloadVersion(
        self, request: reg.DownloadVersionRequest, context: Context
    ) -> AsyncIterator[reg.DownloadVersionResponse]:
        version = self.resolve(request.ref, current_tenant())
        yield reg.DownloadVersionResponse(data=self.contents[version.digest][request.file])

    async def DeleteAdapter(
        self, request: reg.DeleteAdapterRequest, context: Context
    ) -> reg.DeleteAdapterResponse:
        self._adapter(request.adapter)
        del self.adapters[current_tenant(), request.adapter]
        del self.versions[current_tenant(), request.adapter]
        return reg.DeleteAdapterResponse()

    async def DeleteVersion(self, request: reg.DeleteVersionRequest, context: Context) -> reg.AdapterVersion:
        version = self.resolve(f"{request.adapter}:{request.version}", current_tenant())
        self.versions[current_tenant(), request.adapter].remove(version)
        return version

    async def DeleteAlias(self, request: reg.DeleteAliasRequest, context: Context) -> reg.DeleteAliasResponse:
        if self.history.pop((current_tenant(), request.adapter, request.alias), None) is None:
            raise NotFound("alias_not_found", "no such alias", field="alias")
        return reg.DeleteAliasResponse()

    def _adapter(self, name: str) -> reg.Adapter:
        adapter = self.adapters.get((current_tenant(), name))
        if adapter is None:
            raise NotFound("adapter_not_found", "no such adapter", field="adapter")
        return adapter


@dataclass
class Script:
    """How a generation goes: an error at once, or texts, then an error, a halt or an end.

    An end token is a token without text. `stop` is the stop string that ended it; `logprobs` has one for each
    completion, which all of its tokens have.
    """

    refuse: LorafleetError | None = None
    texts: list[str] = field(default_factory=lambda: ["Hello", " world"])
    fail: LorafleetError | None = None
    hang: bool = False
    hang_before_start: bool = False
    pause_seconds: float = 0.0
    reason: gen.FinishReason.ValueType = gen.FinishReason.FINISH_REASON_STOP
    end_token: bytes | None = None
    stop: str = ""
    logprobs: tuple[float, ...] = (-0.5,) * 16


class FakeInference(InferenceServiceServicer):
    """Answers by the script of the prompt's text (or of the last message), else by the default one."""

    def __init__(self, adapters: FakeAdapters) -> None:
        self._adapters = adapters
        self.scripts: dict[str, Script] = {}
        self.requests: list[gen.GenerateRequest] = []
        self.metadata: dict[str, str] = {}
        self.started = 0
        self.cancelled = 0
        self.ended = 0
        self.resident: list[inf.ResidentAdapter] = []
        self.fingerprint = FINGERPRINT

    async def Generate(
        self, request: gen.GenerateRequest, context: Context
    ) -> AsyncIterator[gen.GenerateResponse]:
        self.requests.append(request)
        self.metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        try:
            async for response in self._generate(request):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.ended += 1

    async def _generate(self, request: gen.GenerateRequest) -> AsyncIterator[gen.GenerateResponse]:
        text = self._text(request)
        script = self.scripts.get(text, Script())
        if script.refuse is not None:
            raise script.refuse
        version = reg.AdapterVersion()
        if request.model.WhichOneof("target") == "adapter":
            version = self._adapters.resolve(request.model.adapter, current_tenant())
        self.started += 1
        if script.hang_before_start:
            await asyncio.sleep(3600)
        prompt = self._tokens(text)
        started = gen.Started(
            request_id=new_id("gen"),
            version_digest=version.digest,
            version_ref=f"{version.adapter}:{version.version}" if version.adapter else "",
            prompt_tokens=len(prompt),
            base_fingerprint_digest=FINGERPRINT,
        )
        if request.sampling.HasField("prompt_logprobs"):
            started.prompt_logprobs.extend(
                self._position(token, request.sampling.prompt_logprobs) for token in prompt[1:]
            )
        yield gen.GenerateResponse(started=started)
        completions = request.sampling.n or 1
        tokens = [(text, text.encode()) for text in script.texts]
        if script.end_token is not None:
            tokens.append(("", script.end_token))
        for piece, token in tokens:
            for index in range(completions):
                delta = gen.Delta(index=index, text=piece)
                if request.sampling.HasField("logprobs"):
                    alternatives, logprob = request.sampling.logprobs, script.logprobs[index]
                    delta.logprobs.append(self._position(token, alternatives, logprob))
                yield gen.GenerateResponse(delta=delta)
                await asyncio.sleep(script.pause_seconds)
        if script.fail is not None:
            raise script.fail
        if script.hang:
            await asyncio.sleep(3600)
        for index in range(completions):
            usage = gen.Usage(prompt_tokens=len(prompt), completion_tokens=len(tokens))
            finished = gen.Finished(index=index, reason=script.reason, stop=script.stop, usage=usage)
            yield gen.GenerateResponse(finished=finished)

    async def Tokenize(self, request: inf.TokenizeRequest, context: Context) -> inf.TokenizeResponse:
        tokens = self._tokens(request.text)
        return inf.TokenizeResponse(token_ids=[token[0] for token in tokens], tokens=tokens)

    async def Detokenize(self, request: inf.DetokenizeRequest, context: Context) -> inf.DetokenizeResponse:
        return inf.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def Embed(self, request: inf.EmbedRequest, context: Context) -> inf.EmbedResponse:
        if request.model.WhichOneof("target") == "adapter":
            self._adapters.resolve(request.model.adapter, current_tenant())
        tokens = sum(len(text) for text in request.inputs)
        vectors = [inf.Embedding(values=[float(len(text)), 0.5]) for text in request.inputs]
        return inf.EmbedResponse(embeddings=vectors, usage=gen.Usage(prompt_tokens=tokens))

    async def ListResident(
        self, request: inf.ListResidentRequest, context: Context
    ) -> inf.ListResidentResponse:
        return inf.ListResidentResponse(adapters=self.resident)

    async def GetStatus(self, request: inf.GetStatusRequest, context: Context) -> inf.EngineStatus:
        return inf.EngineStatus(
            base_model=BASE,
            base_fingerprint_digest=self.fingerprint,
            start_time=now(),
            device="cpu",
            max_model_len=1024,
        )

    @staticmethod
    def _text(request: gen.GenerateRequest) -> str:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            return request.text
        if kind == "tokens":
            return bytes(request.tokens.token_ids).decode()
        return request.chat.messages[-1].content

    @staticmethod
    def _tokens(text: str) -> list[bytes]:
        """One token per byte."""
        return [bytes([byte]) for byte in text.encode()]

    @staticmethod
    def _position(token: bytes, alternatives: int, logprob: float = -0.5) -> gen.PositionLogprobs:
        chosen = gen.TokenLogprob(token_id=token[0] if token else 0, text=token, logprob=logprob)
        others = [
            gen.TokenLogprob(token_id=number, text=b"alt%d" % number, logprob=-1.0 - number)
            for number in range(1, alternatives)
        ]
        return gen.PositionLogprobs(chosen=chosen, alternatives=[chosen, *others][:alternatives])


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
