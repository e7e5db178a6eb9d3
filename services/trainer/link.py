"""The line between a worker and the child process that runs its jobs: JSON lines over standard streams.

A child runs one job, or several that train together. Every job has a line of its own on the link: what ends
one of them leaves the others alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from pydantic import TypeAdapter

from services.trainer.failure import JobFailure
from services.trainer.job import Draft, Job


class Order(StrEnum):
    """What a worker wants of a job that runs."""

    CANCEL = "cancel"
    """Stop at the next step; nothing is kept."""

    HAND_BACK = "hand_back"
    """Write a checkpoint at the next step and stop."""

    DROP = "drop"
    """Stop and tell nothing: another worker has the job now."""


class Outcome(StrEnum):
    """How a job's run ended."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed_back"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ToChild:
    """One line to the child: first the jobs and the start, then acknowledgements and orders by job.

    Attributes:
        traceparent: the span of the job's run, which comes with the job.
    """

    job: Job | None = None
    traceparent: str = ""
    start: bool = False
    job_id: str = ""
    acknowledged: int | None = None
    order: Order | None = None


@dataclass(frozen=True, slots=True)
class FromChild:
    """One line from the child about one of its jobs: a draft to record, or how its run ended.

    Attributes:
        number: 1, 2, 3 ... within the job; the worker acknowledges a draft by it once the record is durable.
    """

    number: int
    job_id: str
    draft: Draft | None = None
    outcome: Outcome | None = None
    failure: JobFailure | None = None


_TO_CHILD: TypeAdapter[ToChild] = TypeAdapter(ToChild)
_FROM_CHILD: TypeAdapter[FromChild] = TypeAdapter(FromChild)


def encode_to_child(message: ToChild) -> bytes:
    """Return the message as a line."""
    return _TO_CHILD.dump_json(message, exclude_none=True) + b"\n"


def decode_from_child(line: bytes) -> FromChild:
    """Return the message in a line."""
    return _FROM_CHILD.validate_json(line)


class WorkerGoneError(Exception):
    """The worker has closed its end, or lost the job; nobody waits for this run any more."""


class JobLine:
    """One job's part of the child's end. `send` and its like may be called from one thread at a time."""

    def __init__(self, job_id: str, write: Callable[[FromChild], None], traceparent: str = "") -> None:
        """Send with `write`; `traceparent` is the span of the job's run."""
        self.traceparent = traceparent
        self._job_id = job_id
        self._write = write
        self._changed = threading.Condition()
        self._acknowledged = 0
        self._sent = 0
        self._order: Order | None = None
        self._is_gone = False

    @property
    def order(self) -> Order | None:
        """What the worker wants, if anything; raises `WorkerGoneError` where it is gone."""
        with self._changed:
            self._require_worker()
            return self._order

    def send(self, draft: Draft) -> None:
        """Have a record added to the job."""
        with self._changed:
            self._require_worker()
        self._write(FromChild(self._next(), self._job_id, draft=draft))

    def send_durably(self, draft: Draft) -> None:
        """Have a record added and return once it is stored; raise `WorkerGoneError` if it never is."""
        number = self._next()
        self._write(FromChild(number, self._job_id, draft=draft))
        with self._changed:
            self._changed.wait_for(lambda: self._is_gone or self._acknowledged >= number)
            self._require_worker()

    def finish(self, outcome: Outcome, failure: JobFailure | None = None) -> None:
        """Tell the worker how the run ended."""
        self._write(FromChild(self._next(), self._job_id, outcome=outcome, failure=failure))

    def take(self, message: ToChild) -> None:
        """Take note of what the worker says about this job."""
        with self._changed:
            if message.acknowledged is not None:
                self._acknowledged = message.acknowledged
            if message.order is Order.DROP:
                self._is_gone = True
            elif message.order is not None:
                self._order = message.order
            self._changed.notify_all()

    def hang_up(self) -> None:
        """Take note that the worker is gone."""
        with self._changed:
            self._is_gone = True
            self._changed.notify_all()

    def _require_worker(self) -> None:
        if self._is_gone:
            raise WorkerGoneError

    def _next(self) -> int:
        self._sent += 1
        return self._sent


class WorkerLink:
    """The child's end. A thread of its own listens for the worker."""

    def __init__(self) -> None:
        # Libraries print to standard output; that must not end up among the messages.
        self._out: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        # A reader of our own: the thread waits in it to the end, and sys.stdin is closed before that.
        self._in: BinaryIO = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
        self._writing = threading.Lock()
        self._lines: dict[str, JobLine] = {}

    def receive_jobs(self) -> list[Job]:
        """Return the jobs to run; from then on orders are listened for."""
        jobs = []
        while not (message := _TO_CHILD.validate_json(self._in.readline())).start:
            job = message.job
            assert job is not None, "jobs come before the start"
            jobs.append(job)
            self._lines[job.id] = JobLine(job.id, self._write, message.traceparent)
        threading.Thread(target=self._listen, name="worker-link", daemon=True).start()
        return jobs

    def of(self, job_id: str) -> JobLine:
        """Return the line of one of the jobs."""
        return self._lines[job_id]

    def _write(self, message: FromChild) -> None:
        data = _FROM_CHILD.dump_json(message, exclude_none=True) + b"\n"
        try:
            with self._writing:
                while data:
                    data = data[self._out.write(data) :]
        except BrokenPipeError as error:
            raise WorkerGoneError from error

    def _listen(self) -> None:
        for data in self._in:
            message = _TO_CHILD.validate_json(data)
            self._lines[message.job_id].take(message)
        for line in self._lines.values():
            line.hang_up()
