"""What jobs lose that are killed again and again: nothing. Each makes one version, equal to the last bit.

Tiny QLoRA jobs run on a real trainer beside a real registry. Their processes end by SIGKILL at places drawn
from every stage (tokens, base, steps, checkpoints, evaluation, publishing, report), and the trainer itself
ends so while it validates and while it records. Every job must end SUCCEEDED with exactly one version whose
files have the digest of an undisturbed run. The last line is JSON.

    python -m bench.job_kills --kills 100 --seed 1

With `--folder` all of it is kept there, and the same command goes on where an earlier one was ended.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorafleet.registry.v1 import adapter_pb2
from lorafleet.trainer.v1 import job_pb2, trainer_service_pb2
from services.common.errors import DeadlineExceeded, LorafleetError, NotFound, Unavailable
from services.common.failpoints import VARIABLE
from services.common.valkey import EmbeddedValkey
from tests.support.models import make_tiny_llama
from tests.support.trainer import (
    BASE,
    FINAL,
    Trainer,
    TrainerPlace,
    prompt_rows,
    registry_host,
    running_trainer,
    spec,
)

DATA = prompt_rows(24)
# 12 steps, a checkpoint every 4. Alone: what trains together may differ in the last bit.
SPEC = spec(n_epochs=3, batch_size=5, checkpoint_steps=4, dropout=0.1, validation_fraction=0.17, joint=False)
SERVICE_PLACES = {
    "validate.before_read": 2,
    "validate.before_record": 2,
    "record.before_store": 40,
    "record.before_index": 40,
}
# A trainer that was not killed after so many kills of jobs ends, and the next one starts.
SERVICE_SHARE = 6
JOBS_AT_ONCE = 3
POLL_SECONDS = 0.3
UNDISTURBED = "undisturbed"


@dataclass
class Counts:
    """What was seen.

    Attributes:
        kills: processes that ended by SIGKILL.
        by_stage: of those, the ones of each stage.
        wrong_versions: jobs without exactly one version.
        different: jobs whose version is not that of the undisturbed run.
        not_succeeded: jobs that ended in another way.
        broken_histories: jobs whose events have a gap, or whose state went back.
    """

    kills: int = 0
    by_stage: dict[str, int] = field(default_factory=dict)
    jobs: int = 0
    attempts: int = 0
    wrong_versions: int = 0
    different: int = 0
    not_succeeded: int = 0
    broken_histories: int = 0
    seconds: float = 0.0


def main() -> None:
    """Kill until the count is reached, and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where jobs and kills are kept from one run to the next")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(options.folder or Path(folder), options.kills, options.seed)
    figures = {name: getattr(counts, name) for name in counts.__dataclass_fields__}
    print(json.dumps({"benchmark": "job_kills", "seed": options.seed} | figures))


def run(folder: Path, kills: int, seed: int) -> Counts:
    """Kill processes until there were `kills`; return what became of the jobs."""
    base = folder / BASE
    if not base.exists():
        make_tiny_llama(base)
    with EmbeddedValkey.start(folder / "valkey") as valkey:
        # A machine that is busy with other things must not end the measurement.
        place = TrainerPlace(base, folder, valkey.url, start_seconds=900, call_seconds=300)
        return asyncio.run(_Rounds(place, kills, seed).run())


class _Rounds:
    """One trainer after the other over the same jobs, until enough processes were killed."""

    def __init__(self, place: TrainerPlace, kills: int, seed: int) -> None:
        self._place = place
        self._kills = kills
        self._log = place.folder / "kills.log"
        self._service_log = place.folder / "service_kills.log"
        self._draw = random.Random(f"{seed}/{len(self._killed())}")
        self._job_ids: list[str] = []
        self._file = ""

    async def run(self) -> Counts:
        started = time.monotonic()
        async with registry_host(self._place) as registry:
            async with running_trainer(self._place, registry, MAX_CRASHES="100") as trainer:
                known = {job.adapter: job for job in await _jobs(trainer)}
                undisturbed = known.get(UNDISTURBED) or await trainer.create(DATA, SPEC, adapter=UNDISTURBED)
                await trainer.until(undisturbed.id, job_pb2.JOB_STATE_SUCCEEDED, seconds=1800)
                wanted = (await _versions(trainer, UNDISTURBED))[0].digest
                self._file = undisturbed.training_file
                self._job_ids = [job.id for job in known.values() if job.adapter != UNDISTURBED]
            done = False
            while not done:
                done = await self._round(registry)
            async with running_trainer(self._place, registry, MAX_CRASHES="100") as trainer:
                counts = await self._audit(trainer, wanted)
        counts.seconds = time.monotonic() - started
        return counts

    def _killed(self) -> list[str]:
        logs = [log for log in (self._log, self._service_log) if log.exists()]
        return [rule for log in logs for rule in log.read_text("ascii").split()]

    async def _round(self, registry: str) -> bool:
        """Run one trainer until it is killed; return whether all jobs are done, after enough kills."""
        enough = len(self._killed()) >= self._kills
        # The trainer is due again once so many jobs were killed.
        until = self._kills if enough else min(self._kills, len(self._killed()) + SERVICE_SHARE)
        place, visits = self._draw.choice(list(SERVICE_PLACES.items()))
        rule = "" if enough else f"{place}=kill:{self._draw.randint(1, visits)}"
        environment = {VARIABLE: rule, "KILLS_SEED": str(self._draw.randrange(10**6))}
        if not enough:
            environment["KILLS_LOG"] = str(self._log)
        with _environment(environment):
            async with running_trainer(
                self._place,
                registry,
                module="tests.support.killed_trainer",
                MAX_CRASHES="100",
                CONCURRENCY="2",
            ) as trainer:
                try:
                    return await self._work(trainer, until)
                except LorafleetError as error:
                    try:
                        code = await asyncio.wait_for(trainer.process.wait(), 60)
                    except TimeoutError:
                        if not isinstance(error, DeadlineExceeded | Unavailable):
                            raise error from None
                        # The machine is busy. The next trainer goes on with what there is.
                        return False
                    if code != -signal.SIGKILL:
                        raise AssertionError(f"{rule}: the trainer ended with {code}") from error
                    with self._service_log.open("a", encoding="ascii") as log:
                        log.write(f"{rule}\n")
                    return False

    async def _work(self, trainer: Trainer, until: int) -> bool:
        """Keep the trainer busy until so many processes were killed.

        Returns:
            True once there were enough kills and every job is done, False where a trainer is to start anew.
        """
        is_last = len(self._killed()) >= self._kills
        while True:
            states = [(await trainer.job(job_id)).state for job_id in self._job_ids]
            running = sum(state not in FINAL for state in states)
            if is_last and not running:
                return True
            if not is_last and len(self._killed()) >= until:
                return False
            if not is_last and running < JOBS_AT_ONCE:
                number = len(self._job_ids)
                name = f"job-{number}"
                # Again, where the answer of before was lost.
                job = await trainer.create(
                    DATA, SPEC, adapter=name, training_file=self._file, idempotency_key=name
                )
                self._job_ids.append(job.id)
            await asyncio.sleep(POLL_SECONDS)

    async def _audit(self, trainer: Trainer, wanted: str) -> Counts:
        killed = self._killed()
        stages = collections.Counter(rule.partition(".")[0] for rule in killed)
        counts = Counts(kills=len(killed), by_stage=dict(sorted(stages.items())), jobs=len(self._job_ids))
        for job_id in self._job_ids:
            job = await trainer.job(job_id)
            events = await trainer.events(job_id)
            numbers = [int(event.id.rpartition("-")[2]) for event in events]
            states = [event.state for event in events if event.state]
            versions = await _versions(trainer, job.adapter)
            counts.attempts += job.attempts
            counts.not_succeeded += job.state != job_pb2.JOB_STATE_SUCCEEDED
            counts.wrong_versions += len(versions) != 1
            counts.different += any(version.digest != wanted for version in versions)
            is_whole = numbers == list(range(1, len(events) + 1)) and states == sorted(set(states))
            counts.broken_histories += not is_whole
            if not is_whole or job.state != job_pb2.JOB_STATE_SUCCEEDED or len(versions) != 1:
                print(f"{job.id}: {job.state}, {len(versions)} versions, {job.error.message}")
        return counts


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables of this process, which its children inherit, while the body runs."""
    os.environ |= values
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


async def _jobs(trainer: Trainer) -> list[job_pb2.Job]:
    """The jobs that an earlier run has begun, oldest first."""
    response = await trainer.call("ListJobs", trainer_service_pb2.ListJobsRequest(page_size=1000))
    return list(reversed(response.jobs))


async def _versions(trainer: Trainer, adapter: str) -> list[adapter_pb2.AdapterVersion]:
    request = adapter_pb2.ListVersionsRequest(adapter=adapter)
    try:
        response = await trainer.registry.call(trainer.registry.adapters.ListVersions, request)
    except NotFound:
        return []
    return list(response.versions)


if __name__ == "__main__":
    main()
