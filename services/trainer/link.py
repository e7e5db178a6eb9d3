"""The line between a worker and the child process that runs a job: JSON lines over standard streams."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import BinaryIO

from pydantic import TypeAdapter

from services.trainer.failure import JobFailure
from services.trainer.job import Draft, Job


class Order(StrEnum):
    """What a worker wants of a child that runs."""

    CANCEL = "cancel"
    """Stop at the next step; nothing is kept."""

    HAND_BACK = "hand_back"
    """Write a checkpoint at the next step and stop."""


class Outcome(StrEnum):
    """How a child ended."""

    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed_back"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ToChild:
    """One line to the child: first the job, then acknowledgements and orders."""

    job: Job | None = None
    acknowledged: int | None = None
    order: Order | None = None


@dataclass(frozen=True, slots=True)
class FromChild:
    """One line from the child: a draft to record, or how it ended.

    Attributes:
        number: 1, 2, 3 ...; the worker acknowledges a draft by it once the record is durable.
    """

    number: int
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
    """The worker has closed its end; nobody waits for this child any more."""


class WorkerLink:
    """The child's end. `send` may be called from one thread; a thread of its own listens for the worker."""

    def __init__(self) -> None:
        # Libraries print to standard output; that must not end up among the messages.
        self._out: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._in: BinaryIO = sys.stdin.buffer
        self._changed = threading.Condition()
        self._acknowledged = 0
        self._sent = 0
        self._order: Order | None = None
        self._is_gone = False

    def receive_job(self) -> Job:
        """Return the job to run; from then on orders are listened for."""
        message = _TO_CHILD.validate_json(self._in.readline())
        assert message.job is not None, "the first line is the job"
        threading.Thread(target=self._listen, name="worker-link", daemon=True).start()
        return message.job

    @property
    def order(self) -> Order | None:
        """What the worker wants, if anything; raises `WorkerGoneError` where it is gone."""
        with self._changed:
            if self._is_gone:
                raise WorkerGoneError
            return self._order

    def send(self, draft: Draft) -> None:
        """Have a record added to the job."""
        self._write(FromChild(self._next(), draft=draft))

    def send_durably(self, draft: Draft) -> None:
        """Have a record added and return once it is stored; raise `WorkerGoneError` if it never is."""
        number = self._next()
        self._write(FromChild(number, draft=draft))
        with self._changed:
            self._changed.wait_for(lambda: self._is_gone or self._acknowledged >= number)
            if self._is_gone:
                raise WorkerGoneError

    def finish(self, outcome: Outcome, failure: JobFailure | None = None) -> None:
        """Tell the worker how the job ended."""
        self._write(FromChild(self._next(), outcome=outcome, failure=failure))

    def _next(self) -> int:
        self._sent += 1
        return self._sent

    def _write(self, message: FromChild) -> None:
        line = _FROM_CHILD.dump_json(message, exclude_none=True) + b"\n"
        try:
            while line:
                line = line[self._out.write(line) :]
        except BrokenPipeError as error:
            raise WorkerGoneError from error

    def _listen(self) -> None:
        for line in self._in:
            message = _TO_CHILD.validate_json(line)
            with self._changed:
                if message.acknowledged is not None:
                    self._acknowledged = message.acknowledged
                if message.order is not None:
                    self._order = message.order
                self._changed.notify_all()
        with self._changed:
            self._is_gone = True
            self._changed.notify_all()
