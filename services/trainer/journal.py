"""The durable truth about jobs: append-only objects in the object store.

Layout, under `trainer/jobs/<job id>/`:

- `request.json`: what was asked for; the job exists once this is stored.
- `records/<sequence>-<token>.jsonl`: one or more records, in order; the key names the first one.
- `cancels/<id>.json`: somebody asked for the job to be cancelled.
- `pauses/<sequence>-<id>.json`: somebody asked for it to be paused when it had that many records.
- `checkpoints/<checkpoint id>/`: see `checkpoint_store`.
- `publications/<id>.json`: a checkpoint was published; whoever did so need not hold the lease.

Records are written by the holder of the job's lease alone. Should two ever write the same sequence number,
the one with the higher fencing token counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from services.common.ids import new_id
from services.common.store import ObjectNotFoundError, ObjectStore
from services.trainer.job import Job, JobRequest, Publication, Record, fold

_ROOT = "trainer/jobs/"
_REQUEST: TypeAdapter[JobRequest] = TypeAdapter(JobRequest)
_RECORD: TypeAdapter[Record] = TypeAdapter(Record)
_PUBLICATION: TypeAdapter[Publication] = TypeAdapter(Publication)


@dataclass(frozen=True, slots=True)
class History:
    """Everything stored about one job."""

    request: JobRequest
    records: tuple[Record, ...]
    cancel_asked: bool
    pause_asked_at: int = 0
    publications: tuple[Publication, ...] = ()

    @property
    def job(self) -> Job:
        """The job after all records."""
        return fold(self.request, self.records)


class Journal:
    """Reads and appends histories. Every method blocks; call it in a thread."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(self, request: JobRequest) -> None:
        """Store a new job's request. A second time, with the same id, changes nothing."""
        self._store.put(_key(request.id, "request.json"), _REQUEST.dump_json(request))

    def append(self, job_id: str, records: Sequence[Record]) -> None:
        """Store records that follow each other; they are durable when this returns."""
        first = records[0]
        key = _key(job_id, f"records/{first.sequence:08d}-{first.token:08d}.jsonl")
        self._store.put(key, b"".join(encode_record(record) + b"\n" for record in records))

    def ask_cancel(self, job_id: str) -> None:
        """Store that the job is to be cancelled."""
        self._store.put(_key(job_id, f"cancels/{new_id('cancel')}.json"), b"{}")

    def ask_pause(self, job_id: str, sequence: int) -> None:
        """Store that the job, which has `sequence` records, is to be paused."""
        self._store.put(_key(job_id, f"pauses/{sequence:08d}-{new_id('pause')}.json"), b"{}")

    def add_publication(self, job_id: str, publication: Publication) -> None:
        """Store that a checkpoint of the job was published."""
        key = _key(job_id, f"publications/{new_id('publication')}.json")
        self._store.put(key, encode_publication(publication))

    def load(self, job_id: str) -> History | None:
        """Return all that is stored about a job, or None where there is no such job."""
        try:
            request = _REQUEST.validate_json(self._store.get(_key(job_id, "request.json")))
        except ObjectNotFoundError:
            return None
        stored: list[Record] = []
        for item in self._store.list(_key(job_id, "records/")):
            stored += [_RECORD.validate_json(line) for line in self._store.get(item.key).splitlines()]
        cancel_asked = any(True for _ in self._store.list(_key(job_id, "cancels/")))
        return History(
            request,
            tuple(_in_order(stored)),
            cancel_asked,
            self._pause_asked_at(job_id),
            self._publications(job_id),
        )

    def _pause_asked_at(self, job_id: str) -> int:
        keys = [item.key for item in self._store.list(_key(job_id, "pauses/"))]
        return int(max(keys).rpartition("/")[2].partition("-")[0]) if keys else 0

    def _publications(self, job_id: str) -> tuple[Publication, ...]:
        items = self._store.list(_key(job_id, "publications/"))
        return tuple(decode_publication(self._store.get(item.key)) for item in items)

    def job_ids(self) -> Iterator[str]:
        """Yield the ids of all jobs, oldest first."""
        position = _ROOT
        while True:
            # One listing step per job: from behind everything of the last one.
            found = next(iter(self._store.list(_ROOT, start_after=position)), None)
            if found is None:
                return
            job_id = found.key.removeprefix(_ROOT).split("/", 1)[0]
            yield job_id
            position = f"{_ROOT}{job_id}/~"


def checkpoint_prefix(job_id: str) -> str:
    """Return the key prefix of a job's checkpoints."""
    return _key(job_id, "checkpoints")


def encode_record(record: Record) -> bytes:
    """Return the record as one line of JSON, without its end."""
    return _RECORD.dump_json(record, exclude_none=True)


def decode_record(line: bytes | str) -> Record:
    """Return the record in what `encode_record` made."""
    return _RECORD.validate_json(line)


def encode_publication(publication: Publication) -> bytes:
    """Return the publication as JSON."""
    return _PUBLICATION.dump_json(publication)


def decode_publication(data: bytes | str) -> Publication:
    """Return the publication in what `encode_publication` made."""
    return _PUBLICATION.validate_json(data)


def _in_order(stored: list[Record]) -> Iterator[Record]:
    """Yield records 1, 2, 3 ...; of several with one number the one with the highest token."""
    best: dict[int, Record] = {}
    for record in stored:
        known = best.get(record.sequence)
        if known is None or record.token > known.token:
            best[record.sequence] = record
    token = 0
    for sequence in range(1, len(best) + 1):
        found = best.get(sequence)
        # A lower token after a higher one was written by a holder that had lost its lease.
        if found is None or found.token < token:
            return
        token = found.token
        yield found


def _key(job_id: str, rest: str) -> str:
    return f"{_ROOT}{job_id}/{rest}"
