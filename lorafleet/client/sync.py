"""The blocking client: the asyncio one, run on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lorafleet.client.adapters import AsyncAdapters
from lorafleet.client.aio import AsyncClient
from lorafleet.client.generation import AsyncInference, Chunk, Completion, Prompt
from lorafleet.client.jobs import AsyncJobs
from lorafleet.inference.v1 import inference_service_pb2
from lorafleet.registry.v1 import adapter_pb2, file_pb2
from lorafleet.trainer.v1 import job_pb2

ResultT = TypeVar("ResultT")


class _Loop:
    """An event loop on a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lorafleet-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Return what `work` returns; an interrupt ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, items: Callable[[], AsyncIterator[ResultT]]) -> Iterator[ResultT]:
        """Yield what an asynchronous iterator yields; leaving early closes it."""
        source = items()
        try:
            while True:
                try:
                    yield self.run(_next(source))
                except StopAsyncIteration:
                    return
        finally:
            self.run(_close(source))

    def stop(self) -> None:
        """End the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(source: AsyncIterator[ResultT]) -> ResultT:
    return await anext(source)


async def _close(source: AsyncIterator[Any]) -> None:
    await source.aclose()  # type: ignore[attr-defined]


class Adapters:
    """As `AsyncAdapters`, blocking."""

    def __init__(self, loop: _Loop, calls: AsyncAdapters) -> None:
        self._run, self._calls = loop.run, calls

    def all(self, *, name_contains: str = "") -> list[adapter_pb2.Adapter]:
        """Return every adapter whose name contains the text, by name."""
        return self._run(self._calls.all(name_contains=name_contains))

    def get(self, name: str) -> adapter_pb2.Adapter:
        """Return one adapter."""
        return self._run(self._calls.get(name))

    def versions(self, name: str) -> list[adapter_pb2.AdapterVersion]:
        """Return an adapter's versions, newest first."""
        return self._run(self._calls.versions(name))

    def resolve(self, ref: str) -> adapter_pb2.AdapterVersion:
        """Return the version that a reference names now."""
        return self._run(self._calls.resolve(ref))

    def push(
        self, name: str, folder: Path, *, base: str = "", description: str = "", idempotency_key: str = ""
    ) -> adapter_pb2.AdapterVersion:
        """Publish the PEFT adapter in `folder` as the next version of `name`."""
        return self._run(
            self._calls.push(
                name, folder, base=base, description=description, idempotency_key=idempotency_key
            )
        )

    def pull(self, ref: str, folder: Path) -> adapter_pb2.AdapterVersion:
        """Write a version's two files to `folder`, checked."""
        return self._run(self._calls.pull(ref, folder))

    def delete(self, name: str, version: int | None = None) -> None:
        """Delete a version, or with None the adapter."""
        self._run(self._calls.delete(name, version))

    def set_alias(
        self, name: str, alias: str, version: int, *, expected_generation: int | None = None
    ) -> adapter_pb2.Alias:
        """Create or move an alias."""
        return self._run(self._calls.set_alias(name, alias, version, expected_generation=expected_generation))

    def rollback(self, name: str, alias: str) -> adapter_pb2.Alias:
        """Move an alias back to where it pointed before its last move."""
        return self._run(self._calls.rollback(name, alias))

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove an alias."""
        self._run(self._calls.delete_alias(name, alias))

    def alias_history(self, name: str, alias: str) -> list[adapter_pb2.Alias]:
        """Return every move of an alias, newest first."""
        return self._run(self._calls.alias_history(name, alias))


class Jobs:
    """As `AsyncJobs`, blocking."""

    def __init__(self, loop: _Loop, calls: AsyncJobs) -> None:
        self._run, self._iterate, self._calls = loop.run, loop.iterate, calls

    def upload(self, path: Path) -> file_pb2.File:
        """Upload a data file: one JSON object per line."""
        return self._run(self._calls.upload(path))

    def create(
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
        """Create a job."""
        return self._run(
            self._calls.create(
                training_file,
                adapter=adapter,
                base=base,
                validation_file=validation_file,
                spec=spec,
                seed=seed,
                metadata=metadata,
                idempotency_key=idempotency_key,
            )
        )

    def get(self, job_id: str) -> job_pb2.Job:
        """Return one job."""
        return self._run(self._calls.get(job_id))

    def all(self, *, state: job_pb2.JobState.ValueType = job_pb2.JOB_STATE_UNSPECIFIED) -> list[job_pb2.Job]:
        """Return the jobs in a state, or all, newest first."""
        return self._run(self._calls.all(state=state))

    def cancel(self, job_id: str) -> job_pb2.Job:
        """Ask a job to stop at its next step."""
        return self._run(self._calls.cancel(job_id))

    def pause(self, job_id: str) -> job_pb2.Job:
        """Ask a job to stop at its next step and keep a checkpoint."""
        return self._run(self._calls.pause(job_id))

    def resume(self, job_id: str) -> job_pb2.Job:
        """Let a paused job go on."""
        return self._run(self._calls.resume(job_id))

    def events(self, job_id: str, *, after: str = "") -> Iterator[job_pb2.JobEvent]:
        """Yield the events after the one with the id `after`, and live ones until the job has ended."""
        return self._iterate(lambda: self._calls.events(job_id, after=after))

    def past_events(self, job_id: str) -> list[job_pb2.JobEvent]:
        """Return the events so far, oldest first."""
        return self._run(self._calls.past_events(job_id))

    def wait(self, job_id: str) -> job_pb2.Job:
        """Return the job once it has ended, in whatever way."""
        return self._run(self._calls.wait(job_id))

    def checkpoints(self, job_id: str) -> list[job_pb2.Checkpoint]:
        """Return a job's checkpoints, newest first."""
        return self._run(self._calls.checkpoints(job_id))

    def publish_checkpoint(self, job_id: str, checkpoint_id: str, *, adapter: str = "") -> job_pb2.Checkpoint:
        """Publish a checkpoint as a version of `adapter`, empty: the job's; return it with its model name."""
        return self._run(self._calls.publish_checkpoint(job_id, checkpoint_id, adapter=adapter))


class Inference:
    """As `AsyncInference`, blocking."""

    def __init__(self, loop: _Loop, calls: AsyncInference) -> None:
        self._run, self._iterate, self._calls = loop.run, loop.iterate, calls

    def generate(self, prompt: Prompt, *, model: str | None = None, **sampling: Any) -> Completion:
        """Return the answer to one prompt."""
        return self._run(self._calls.generate(prompt, model=model, **sampling))

    def stream(self, prompt: Prompt, *, model: str | None = None, **sampling: Any) -> Iterator[Chunk]:
        """Yield the answer as it is made; leaving early ends the work."""
        return self._iterate(lambda: self._calls.stream(prompt, model=model, **sampling))

    def score(
        self, prompt: Prompt, completions: Sequence[str], *, model: str | None = None
    ) -> list[inference_service_pb2.CompletionScore]:
        """Return the log-probability of each completion after the prompt."""
        return self._run(self._calls.score(prompt, completions, model=model))

    def embed(self, inputs: Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Return the mean of the last hidden states of each input."""
        return self._run(self._calls.embed(inputs, model=model))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._run(self._calls.tokenize(text))

    def status(self) -> inference_service_pb2.EngineStatus:
        """Return what the engine holds and does."""
        return self._run(self._calls.status())

    def resident(self) -> list[inference_service_pb2.ResidentAdapter]:
        """Return the adapters that are loaded or loading."""
        return self._run(self._calls.resident())

    def prefetch(self, ref: str) -> inference_service_pb2.ResidentAdapter:
        """Load a version as far as host memory."""
        return self._run(self._calls.prefetch(ref))

    def evict(self, ref: str) -> None:
        """Drop a version from every tier."""
        self._run(self._calls.evict(ref))

    def pin(self, ref: str) -> inference_service_pb2.ResidentAdapter:
        """Keep a version on the device."""
        return self._run(self._calls.pin(ref))

    def unpin(self, ref: str) -> inference_service_pb2.ResidentAdapter:
        """Let a version go again."""
        return self._run(self._calls.unpin(ref))


class Client:
    """A fleet as one API key sees it; for programs without an event loop. Arguments as `AsyncClient`."""

    def __init__(
        self, target: str | None = None, api_key: str | None = None, *, ca_file: Path | None = None
    ) -> None:
        self._loop = _Loop()

        async def connect() -> AsyncClient:
            return AsyncClient(target, api_key, ca_file=ca_file)

        try:
            self._client = self._loop.run(connect())
        except BaseException:
            self._loop.stop()
            raise
        self.adapters = Adapters(self._loop, self._client.adapters)
        self.jobs = Jobs(self._loop, self._client.jobs)
        self.inference = Inference(self._loop, self._client.inference)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._loop.run(self._client.close())
        self._loop.stop()
