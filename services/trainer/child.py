"""The child process that runs jobs, as their worker sees it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Self

from services.trainer.job_run import JobRun
from services.trainer.link import FromChild, Order, ToChild, decode_from_child, encode_to_child

PARENT_VARIABLE = "LORAFLEET_JOB_WORKER_PID"
_LINE_LIMIT_BYTES = 64 * 1024 * 1024
_MODULE = "services.trainer.run_job"
# For an operator's own choice in the environment to win over.
_PREFERENCES = {
    # Threads that spin while they wait slow a job tenfold where others want the cores too.
    "OMP_WAIT_POLICY": "PASSIVE",
    # A job compiles nothing, and importing torch's compiler takes seconds.
    "TORCHDYNAMO_DISABLE": "1",
}


class JobProcess:
    """A running child. Start it from the main thread: the kernel kills it when that thread ends."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls, runs: Sequence[JobRun]) -> Self:
        """Start a process for jobs that train together; its log goes to our standard error."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(),
            limit=_LINE_LIMIT_BYTES,
            # A signal to our process group (Ctrl-C) is ours to pass on.
            start_new_session=True,
        )
        child = cls(process)
        for run in runs:
            child._send(ToChild(job=run.job, traceparent=run.traceparent))
        child._send(ToChild(start=True))
        return child

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def messages(self) -> AsyncIterator[FromChild]:
        """Yield what the child tells, to the end of its output."""
        while line := await self._stdout.readline():
            yield decode_from_child(line)

    def acknowledge(self, job_id: str, number: int) -> None:
        """Tell the child that what it sent about a job up to `number` is durable."""
        self._send(ToChild(job_id=job_id, acknowledged=number))

    def order(self, job_id: str, order: Order) -> None:
        """Tell the child to stop a job in one way or the other."""
        self._send(ToChild(job_id=job_id, order=order))

    def kill(self) -> None:
        """End the child and whatever it started, at once."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Return the exit code once the child has ended; negative for a signal."""
        return await self._process.wait()

    def _send(self, message: ToChild) -> None:
        # A child that has ended takes no more; its worker learns that from the end of its output.
        if not self._stdin.is_closing():
            self._stdin.write(encode_to_child(message))


def child_environment() -> dict[str, str]:
    """Return the environment of a child process that works with torch."""
    return _PREFERENCES | os.environ | {PARENT_VARIABLE: str(os.getpid())}
