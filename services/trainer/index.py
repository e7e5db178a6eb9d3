"""The index of jobs in Redis or Valkey: what can be rebuilt from the journal, and the leases.

Keys, all under `trainer:`; `<id>` is a job id:

- `complete`: set once everything stored is indexed; missing after a loss of data.
- `job:<id>`: the job as JSON. `records:<id>`: its records as JSON, in order.
- `tenant:<tenant>`: sorted set of the tenant's job ids, by name, which is by time.
- `queue:<lane>`: sorted set of the ids that wait for or are in a lane, oldest first.
- `cancels`: set of ids that are to be cancelled.
- `pauses`: hash from ids to the number of records that the job had when it was to be paused.
- `publications:<id>`: hash from `<checkpoint id>:<adapter>` to the publication as JSON.
- `lease:<id>`, `token:<id>`: see `lease`.
- `paces`: hash from bases to the tokens per second of the last job that trained alone on them.
- `idempotency:<tenant>:<key>`: see `claim_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from pydantic import TypeAdapter
from redis.asyncio import Redis

from services.common.errors import Aborted
from services.common.index_connection import index_errors
from services.trainer.job import Job, JobState, Publication, Record
from services.trainer.journal import (
    History,
    decode_publication,
    decode_record,
    encode_publication,
    encode_record,
)
from services.trainer.lease import Holder, Lease

_JOB: TypeAdapter[Job] = TypeAdapter(Job)
_COMPLETE = "trainer:complete"
_CANCELS = "trainer:cancels"
_PAUSES = "trainer:pauses"
_PACES = "trainer:paces"


class Lane(StrEnum):
    """What a job waits for."""

    VALIDATION = "validation"
    TRAINING = "training"


_LANES = {
    JobState.VALIDATING_FILES: Lane.VALIDATION,
    JobState.QUEUED: Lane.TRAINING,
    JobState.RUNNING: Lane.TRAINING,
}

# Each script answers in one step, so no other client sees half of it.
_CLAIM = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
local token = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], token .. '|' .. ARGV[1], 'PX', ARGV[2])
return token
"""
# A lease that expired or was lost with the index is still its holder's while nobody has taken a higher token.
_RENEW = """
local lease = redis.call('GET', KEYS[1])
local mine = ARGV[1] .. '|'
local free = not lease and redis.call('GET', KEYS[2]) == ARGV[1]
if free or (lease and string.sub(lease, 1, #mine) == mine) then
  redis.call('SET', KEYS[1], mine .. ARGV[2], 'PX', ARGV[3])
  return 1
end
return 0
"""
_RELEASE = """
local lease = redis.call('GET', KEYS[1])
local mine = ARGV[1] .. '|'
if lease and string.sub(lease, 1, #mine) == mine then return redis.call('DEL', KEYS[1]) end
return 0
"""
_DELETE_IF = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


# Nothing is added where the index has lost records or has other ones; the caller then indexes the job anew.
_APPEND = """
if ARGV[1] == 'anew' then redis.call('DEL', KEYS[1])
elseif redis.call('LLEN', KEYS[1]) ~= tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[3], 0, ARGV[3])
for i = 4, 5 do
  if KEYS[i] == ARGV[4] then redis.call('ZADD', KEYS[i], 0, ARGV[3])
  else redis.call('ZREM', KEYS[i], ARGV[3]) end
end
if ARGV[5] == 'final' then
  redis.call('SREM', KEYS[6], ARGV[3])
  redis.call('HDEL', KEYS[7], ARGV[3])
end
for i = 6, #ARGV, 1000 do
  redis.call('RPUSH', KEYS[1], unpack(ARGV, i, math.min(i + 999, #ARGV)))
end
return 1
"""
_UNKNOWN_HOLDER = Holder("unknown", 0, 0)


class StaleLeaseError(Aborted):
    """The lease was taken over; whoever held it must stop."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            "stale_lease", f"another worker has taken job {job_id} over", resource=f"jobs/{job_id}"
        )


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as callers see it: a cancel that was asked for shows before its worker has taken note."""

    job: Job
    cancel_asked: bool
    pause_asked_at: int = 0

    @property
    def pause_asked(self) -> bool:
        """Whether the job is to be paused and is not yet; one pause honours every wish from before it."""
        return self.pause_asked_at > self.job.paused_at

    @property
    def state(self) -> JobState:
        """The state to show."""
        in_work = self.job.state in (JobState.RUNNING, JobState.VALIDATING_FILES)
        return JobState.CANCELLING if self.cancel_asked and in_work else self.job.state


class JobIndex:
    """Queries and changes of the index. Any method may raise `Unavailable` (`store_unavailable`)."""

    def __init__(self, redis: Redis, *, lease_seconds: float) -> None:
        self._redis = redis
        self._lease_milliseconds = int(lease_seconds * 1000)
        self._claim = redis.register_script(_CLAIM)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)
        self._append = redis.register_script(_APPEND)
        self._delete_if = redis.register_script(_DELETE_IF)

    async def is_complete(self) -> bool:
        """Return whether everything stored is indexed."""
        with index_errors():
            return bool(await self._redis.exists(_COMPLETE))

    async def mark_complete(self) -> None:
        """Declare that everything stored is indexed."""
        with index_errors():
            await self._redis.set(_COMPLETE, 1)

    async def put(self, history: History) -> None:
        """Index a job from all that is stored about it, in place of what was there."""
        job = history.job
        request = job.request
        with index_errors():
            # A token handed out before must never be handed out again: set before the job can be claimed.
            if job.last_token > int(await self._redis.get(_token(job.id)) or 0):
                await self._redis.set(_token(job.id), job.last_token)
            if job.is_claimed and not job.state.is_final:
                # Its worker may be alive: nobody else takes it up before a lease would have ended.
                lease = f"{job.last_token}|{_UNKNOWN_HOLDER}"
                await self._redis.set(_lease(job.id), lease, px=self._lease_milliseconds, nx=True)
            if history.cancel_asked and not job.state.is_final:
                await self._redis.sadd(_CANCELS, job.id)
            if history.pause_asked_at > job.paused_at and not job.state.is_final:
                await self._redis.hset(_PAUSES, job.id, str(history.pause_asked_at))
            for publication in history.publications:
                await self._put_publication(job.id, publication)
            if request.idempotency_key:
                claim = claim_text(request.request_digest, job.id, request.create_time)
                await self._redis.set(_idempotency(request.tenant, request.idempotency_key), claim)
        await self._add(job, history.records, after="anew")

    async def append(self, job: Job, records: Sequence[Record]) -> bool:
        """Add stored records, of which `job` is the outcome; return False where earlier ones are missing."""
        return await self._add(job, records, after=str(job.last_sequence - len(records)))

    async def get(self, job_id: str) -> JobView | None:
        """Return a job, or None."""
        views = await self.get_many([job_id])
        return views[0] if views else None

    async def get_many(self, job_ids: Sequence[str]) -> list[JobView]:
        """Return those of the jobs that exist, in the order given."""
        if not job_ids:
            return []
        with index_errors():
            snapshots = await self._redis.mget([_job(job_id) for job_id in job_ids])
            asked = await self._redis.smismember(_CANCELS, list(job_ids))
            pauses = await self._redis.hmget(_PAUSES, list(job_ids))
        return [
            JobView(_JOB.validate_json(snapshot), bool(flag), int(pause or 0))
            for snapshot, flag, pause in zip(snapshots, asked, pauses, strict=True)
            if snapshot is not None
        ]

    async def newest(self, tenant: str, *, before: str | None, limit: int) -> list[str]:
        """Return up to `limit` ids of a tenant's jobs, newest first, older than job `before`."""
        top = "+" if before is None else f"({before}"
        with index_errors():
            found = await self._redis.zrevrangebylex(_tenant(tenant), top, "-", start=0, num=limit)
        return [_text(job_id) for job_id in found]

    async def records(self, job_id: str, first: int, last: int) -> list[Record]:
        """Return the records with sequence numbers `first` to `last`, so far as they exist, in order."""
        with index_errors():
            lines = await self._redis.lrange(_records(job_id), first - 1, last - 1)
        return [decode_record(_text(line)) for line in lines]

    async def waiting(self, lane: Lane) -> list[str]:
        """Return the ids in a lane, oldest first; some may be in work."""
        with index_errors():
            found = await self._redis.zrange(_lane(lane), 0, -1)
        return [_text(job_id) for job_id in found]

    async def ask_cancel(self, job_id: str) -> None:
        """Note that a job is to be cancelled."""
        with index_errors():
            await self._redis.sadd(_CANCELS, job_id)

    async def ask_pause(self, job_id: str, sequence: int) -> None:
        """Note that a job, which has `sequence` records, is to be paused."""
        with index_errors():
            await self._redis.hset(_PAUSES, job_id, str(sequence))

    async def add_publication(self, job_id: str, publication: Publication) -> None:
        """Note that a checkpoint of a job was published."""
        with index_errors():
            await self._put_publication(job_id, publication)

    async def publications(self, job_id: str) -> list[Publication]:
        """Return the versions that a job's checkpoints were published as, in no order."""
        with index_errors():
            found = await self._redis.hvals(_publications(job_id))
        return [decode_publication(_text(value)) for value in found]

    async def pause_asked_at(self, job_id: str) -> int:
        """Return how many records the job had when it was last to be paused; 0 where it never was."""
        with index_errors():
            return int(await self._redis.hget(_PAUSES, job_id) or 0)

    async def cancel_asked(self, job_id: str) -> bool:
        """Return whether a job is to be cancelled."""
        with index_errors():
            return bool(await self._redis.sismember(_CANCELS, job_id))

    async def claim(self, job_id: str, holder: Holder) -> Lease | None:
        """Take the job's lease, or return None where another process holds it.

        The lease of a process that ran on this machine and is gone counts as free at once.
        """
        with index_errors():
            await self._drop_lease_of_the_dead(job_id)
            token = await self._claim(
                keys=[_lease(job_id), _token(job_id)], args=[str(holder), self._lease_milliseconds]
            )
        return Lease(job_id, int(token), holder) if token else None

    async def renew(self, lease: Lease) -> None:
        """Extend a lease; raise `StaleLeaseError` (`stale_lease`) where another process has it now."""
        keys = [_lease(lease.job_id), _token(lease.job_id)]
        with index_errors():
            held = await self._renew(
                keys=keys, args=[lease.token, str(lease.holder), self._lease_milliseconds]
            )
        if not held:
            raise StaleLeaseError(lease.job_id)

    async def release(self, lease: Lease) -> None:
        """Give a lease back; nothing happens where it is another's by now."""
        with index_errors():
            await self._release(keys=[_lease(lease.job_id)], args=[lease.token])

    async def pace(self, base_model: str) -> float | None:
        """Return the tokens per second of the last job that trained alone on a base, if there was one."""
        with index_errors():
            found = await self._redis.hget(_PACES, base_model)
        return None if found is None else float(found)

    async def note_pace(self, base_model: str, tokens_per_second: float) -> None:
        """Note how fast a job trained alone on a base."""
        with index_errors():
            await self._redis.hset(_PACES, base_model, str(tokens_per_second))

    async def unreserve(self, tenant: str, key: str, claim: str) -> None:
        """Free an idempotency key that is bound to `claim`."""
        with index_errors():
            await self._delete_if(keys=[_idempotency(tenant, key)], args=[claim])

    async def reserve(self, tenant: str, key: str, claim: str) -> str | None:
        """Bind an idempotency key to `claim` and return None, or return what it is bound to already."""
        with index_errors():
            name = _idempotency(tenant, key)
            if await self._redis.set(name, claim, nx=True):
                return None
            bound = await self._redis.get(name)
        return None if bound is None else _text(bound)

    async def _add(self, job: Job, records: Sequence[Record], *, after: str) -> bool:
        lane = _LANES.get(job.state)
        with index_errors():
            added = await self._append(
                keys=[
                    _records(job.id),
                    _job(job.id),
                    _tenant(job.request.tenant),
                    *[_lane(lane) for lane in Lane],
                    _CANCELS,
                    _PAUSES,
                ],
                args=[
                    after,
                    _JOB.dump_json(job),
                    job.id,
                    _lane(lane) if lane else "",
                    "final" if job.state.is_final else "",
                    *[encode_record(record) for record in records],
                ],
            )
        return bool(added)

    async def _put_publication(self, job_id: str, publication: Publication) -> None:
        name = f"{publication.checkpoint_id}:{publication.adapter}"
        await self._redis.hset(_publications(job_id), name, encode_publication(publication))

    async def _drop_lease_of_the_dead(self, job_id: str) -> None:
        lease = await self._redis.get(_lease(job_id))
        if lease is not None and Holder.parse(_text(lease).partition("|")[2]).is_known_dead():
            await self._delete_if(keys=[_lease(job_id)], args=[lease])


def claim_text(request_digest: str, job_id: str, time: datetime) -> str:
    """Return what an idempotency key is bound to: digest of the request, job and time."""
    return f"{request_digest} {job_id} {time.timestamp():.3f}"


def _text(value: object) -> str:
    assert isinstance(value, bytes), "the index answers in bytes"
    return value.decode("utf-8")


def _job(job_id: str) -> str:
    return f"trainer:job:{job_id}"


def _publications(job_id: str) -> str:
    return f"trainer:publications:{job_id}"


def _records(job_id: str) -> str:
    return f"trainer:records:{job_id}"


def _lease(job_id: str) -> str:
    return f"trainer:lease:{job_id}"


def _token(job_id: str) -> str:
    return f"trainer:token:{job_id}"


def _tenant(tenant: str) -> str:
    return f"trainer:tenant:{tenant}"


def _lane(lane: Lane) -> str:
    return f"trainer:queue:{lane}"


def _idempotency(tenant: str, key: str) -> str:
    return f"trainer:idempotency:{tenant}:{key}"
