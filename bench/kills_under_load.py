"""What a fleet loses when its processes are killed under load: nothing it listed, and a few requests.

A fleet of its own is started in an empty state folder. Short fine-tuning jobs publish two adapters, an alias
is moved, and then completions of the base and the adapters are kept going through the stock `openai` client
while each process is killed with SIGKILL in turn (the trainer in the middle of a job), Valkey is emptied, and
everything is killed at once and started again with `lorafleet up`. After each step all models, adapters,
versions, aliases and their moves, jobs, events and files must be listed as before, and greedy answers must be
the same to the letter. The last line is JSON; the exit code is 1 if anything was lost.

The client is the stock one with what it does by itself: two more attempts at a request that failed. A stream
whose tokens had begun to come cannot be sent again, so what failed of whole answers is counted apart
(`failed_whole`): that is what a user of the client sees of a call that may be repeated.

    python bench/kills_under_load.py --base assets/base
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import redis
from openai import AsyncOpenAI, OpenAI, OpenAIError

from lorafleet.fleet import launch
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus

PROCESSES = ("valkey", "registry", "inference", "trainer", "gateway")
ADAPTERS = {
    "codes": "{0} -> C{0}\n",
    "doubles": "{0} twice is {0} {0}\n",
    "long": "the number is {0}\n",
}
PROMPTS = ("item 3\n", "item 17\n")
ENDED = {"succeeded", "failed", "cancelled"}
TRAINING_ROWS = 24
CHECKPOINT_STEPS = 10
READY_SECONDS = 120.0
POLL_SECONDS = 0.25
LONGEST_SHOWN = 300
JOB_SECONDS = 600.0
# A request that has no answer and no error this long after the fleet is whole again counts as hanging.
DRAIN_SECONDS = 60.0
# The stock client waits ten minutes for an answer by default; a hang should show sooner.
ANSWER_SECONDS = 30.0
# What broken streams raise: the client passes some errors of its HTTP library on as they are.
REQUEST_ERRORS = (OpenAIError, httpx2.TransportError)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """One greedy completion."""

    model: str
    prompt: str
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; times of the monotonic clock."""

    ask: Ask
    began_at: float
    ended_at: float
    text: str = ""
    error: str | None = None


@dataclass(slots=True)
class Step:
    """What one kill did; seconds are counted from it."""

    name: str
    ok: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    failed_whole: dict[str, int] = field(default_factory=dict)
    hung: int = 0
    wrong_answers: int = 0
    first_success_seconds: float | None = None
    longest_gap_seconds: float | None = None
    whole_again_seconds: float = 0.0
    changed: list[str] = field(default_factory=list)
    answers_unchanged: bool = False
    writes_work: bool = False

    @property
    def is_intact(self) -> bool:
        """Nothing was lost: requests may fail, but not hang, and not answer something else."""
        return (
            not self.changed
            and self.answers_unchanged
            and self.writes_work
            and not self.hung
            and not self.wrong_answers
        )


class Fleet:
    """A fleet that was started through the command line, and its stock clients."""

    def __init__(self, state: StateFolder, base_url: str, api_key: str) -> None:
        self.state = state
        self.base_url, self.api_key = base_url, api_key
        self.client = OpenAI(base_url=base_url, api_key=api_key, timeout=ANSWER_SECONDS)

    @property
    def config(self) -> FleetConfig:
        config = FleetConfig.load(self.state)
        assert config is not None, "the fleet was started"
        return config

    def pids(self) -> dict[str, int]:
        status = FleetStatus.load(self.state)
        return {process.name: process.pid for process in (status.processes if status else ()) if process.pid}

    def kill(self, name: str) -> None:
        """Kill one process and wait until the supervisor has made the fleet whole again."""
        killed = self.pids()[name]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in self.pids().values(), READY_SECONDS)
        self.wait_until_whole()

    def kill_everything(self) -> None:
        """Kill the supervisor and all that runs under it at once, and start the fleet again."""
        status = FleetStatus.load(self.state)
        assert status is not None, "the fleet was started"
        supervisor = psutil.Process(status.supervisor_pid)
        for process in [supervisor, *supervisor.children(recursive=True)]:
            # The kernel may have been faster: what the supervisor started dies with it.
            with suppress(psutil.NoSuchProcess):
                process.kill()
        lorafleet("up", "--state", str(self.state.root))

    def flush_index(self) -> None:
        with redis.Redis(port=self.config.ports.valkey) as index:
            index.flushall()

    def wait_until_whole(self) -> None:
        def is_whole() -> bool:
            return set(self.pids()) == set(PROCESSES) and all(launch.readiness(self.config).values())

        wait_for(is_whole, READY_SECONDS)

    def listing(self) -> dict[str, Json]:
        """Return everything that is listed, by kind and id; of jobs that still run, only that they exist."""
        adapters = self._all("/adapters")
        jobs = [job.to_dict() for job in self.client.fine_tuning.jobs.list()]
        return {
            "models": {model.id: model.to_dict() for model in self.client.models.list()},
            "adapters": {adapter["id"]: adapter for adapter in adapters},
            "versions": {one["id"]: self._all(f"/adapters/{one['id']}/versions") for one in adapters},
            "alias_moves": {
                f"{adapter['id']}@{alias['name']}": self._all(
                    f"/adapters/{adapter['id']}/aliases/{alias['name']}/history"
                )
                for adapter in adapters
                for alias in adapter["aliases"]
            },
            "jobs": {str(job["id"]): job if job["status"] in ENDED else None for job in jobs},
            "events": {str(job["id"]): self.events(job) for job in jobs if job["status"] in ENDED},
            "files": {
                file.id: [
                    file.filename,
                    file.bytes,
                    hashlib.sha256(self.client.files.content(file.id).read()).hexdigest(),
                ]
                for file in self.client.files.list()
            },
        }

    def events(self, job: Json) -> list[Json]:
        events = self.client.fine_tuning.jobs.list_events(str(job["id"]), limit=100)
        return [event.to_dict() for event in events]

    def answers(self, asks: tuple[Ask, ...]) -> dict[Ask, str]:
        """Return greedy answers, asked for one at a time."""
        answers: dict[Ask, str] = {}
        for ask in asks:
            done = self.client.completions.create(**completion(ask))
            answers[ask] = done.choices[0].text
        return answers

    def write(self, mark: str) -> bool:
        """Store a file and set an alias; return whether both are listed then."""
        file = self.client.files.create(
            file=(f"{mark}.jsonl", training_rows(mark + " {0}")), purpose="fine-tune"
        )
        self.set_alias("codes", mark, 1)
        listing = self.listing()
        return file.id in listing["files"] and f"codes@{mark}" in listing["alias_moves"]

    def set_alias(self, adapter: str, alias: str, version: int) -> None:
        path = f"/adapters/{adapter}/aliases/{alias}"
        self.client.put(path, cast_to=object, body={"version": version})

    def create_job(self, adapter: str, *, epochs: int, seed: int) -> str:
        rows = training_rows(ADAPTERS[adapter])
        file = self.client.files.create(file=(f"{adapter}.jsonl", rows), purpose="fine-tune")
        options = {"rank": 8, "learning_rate": 4e-3, "checkpoint_steps": CHECKPOINT_STEPS}
        hyperparameters = {"n_epochs": epochs, "batch_size": 4}
        method = {
            "type": "supervised",
            "supervised": {"hyperparameters": hyperparameters, "lorafleet": options},
        }
        body = {"model": self.config.base_name, "training_file": file.id, "suffix": adapter, "seed": seed}
        job = self.client.post("/fine_tuning/jobs", cast_to=object, body={**body, "method": method})
        assert isinstance(job, dict)
        return str(job["id"])

    def job(self, job_id: str) -> Json:
        return self.client.fine_tuning.jobs.retrieve(job_id).to_dict()

    def finished(self, job_id: str) -> Json:
        """Wait for the end of a job and return it."""
        wait_for(lambda: self.job(job_id)["status"] in ENDED, JOB_SECONDS)
        return self.job(job_id)

    def _all(self, path: str) -> list[Json]:
        page = self.client.get(path, cast_to=object, options={"params": {"limit": 1000}})
        assert isinstance(page, dict)
        assert not page.get("has_more"), f"{path} has more than a page"
        return list(page["data"])


class Load:
    """Completions that are kept going, and what became of them."""

    def __init__(self, client: AsyncOpenAI, asks: tuple[Ask, ...]) -> None:
        self.outcomes: list[Outcome] = []
        self.hung = 0
        self._client = client
        self._asks = itertools.cycle(asks)
        self._stopping = asyncio.Event()

    async def run(self, streams: int) -> None:
        """Keep `streams` requests going until `stop`, then wait for the last answers."""
        tasks = [asyncio.create_task(self._keep_asking()) for _ in range(streams)]
        await self._stopping.wait()
        ended, hanging = await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
        self.hung = len(hanging)
        for task in hanging:
            task.cancel()
        for task in ended:
            task.result()

    def stop(self) -> None:
        self._stopping.set()

    async def _keep_asking(self) -> None:
        while not self._stopping.is_set():
            self.outcomes.append(await self._ask(next(self._asks)))

    async def _ask(self, ask: Ask) -> Outcome:
        began_at = time.monotonic()
        try:
            text = await self._answer(ask)
        except REQUEST_ERRORS as error:
            return Outcome(ask, began_at, time.monotonic(), error=error_name(error))
        return Outcome(ask, began_at, time.monotonic(), text)

    async def _answer(self, ask: Ask) -> str:
        if not ask.is_streamed:
            return (await self._client.completions.create(**completion(ask))).choices[0].text
        stream = await self._client.completions.create(**completion(ask), stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


def main() -> None:
    """Run every step and print what each one did."""
    options = parse_options()
    # The fleet outlives its starter: even an early end has to stop it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with (
        tempfile.TemporaryDirectory(prefix="lorafleet-kills-") as scratch,
        running_fleet(options, StateFolder(Path(scratch) / "state")) as fleet,
    ):
        asks = publish(fleet, options)
        expected = fleet.answers(asks)
        steps, job = asyncio.run(kill_all(fleet, expected, options))
    by_model: dict[str, list[str]] = {}
    for ask, text in expected.items():
        by_model.setdefault(ask.model, []).append(text)
    report(options, steps, job, different_models=len(set(map(tuple, by_model.values()))))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="model folder; the bundled one without it")
    parser.add_argument("--base-name")
    parser.add_argument("--streams", type=int, default=6, help="requests at any time")
    parser.add_argument("--seconds", type=float, default=3.0, help="of load before and after each kill")
    parser.add_argument("--epochs", type=int, default=4, help="of the jobs that publish the adapters")
    parser.add_argument("--killed-job-epochs", type=int, default=20, help="of the job that loses its trainer")
    return parser.parse_args()


@contextmanager
def running_fleet(options: argparse.Namespace, state: StateFolder) -> Iterator[Fleet]:
    """Start a fleet in `state`, and stop it in the end."""
    wishes = ["--base", str(options.base)] if options.base else []
    wishes += ["--base-name", options.base_name] if options.base_name else []
    began_at = time.monotonic()
    started = lorafleet("up", "--state", str(state.root), *wishes)
    print(f"up in {time.monotonic() - began_at:.1f} s", flush=True)
    try:
        yield Fleet(state, started["base_url"], started["api_key"])
    finally:
        lorafleet("down", "--state", str(state.root))


def publish(fleet: Fleet, options: argparse.Namespace) -> tuple[Ask, ...]:
    """Publish two adapters, one with two versions and an alias that has moved; return what to ask."""
    for seed, adapter in enumerate(("codes", "doubles", "codes")):
        job = fleet.finished(fleet.create_job(adapter, epochs=options.epochs, seed=seed))
        assert job["status"] == "succeeded", job["error"]
        print(f"published {job['fine_tuned_model']}", flush=True)
    for version in (1, 2, 1):
        fleet.set_alias("codes", "prod", version)
    models = (fleet.config.base_name, "codes@prod", "codes:2", "doubles")
    return tuple(
        Ask(model, prompt, is_streamed)
        for prompt, is_streamed in zip(PROMPTS, (False, True), strict=True)
        for model in models
    )


async def kill_all(
    fleet: Fleet, expected: dict[Ask, str], options: argparse.Namespace
) -> tuple[list[Step], Json]:
    """Do every harm in turn under load; return the steps, and the job that lost its trainer."""
    steps: list[Step] = []
    killed_job: Json = {}
    for name in PROCESSES:
        job_id = start_long_job(fleet, options) if name == "trainer" else None
        steps.append(await under_load(fleet, f"kill-{name}", partial(fleet.kill, name), expected, options))
        if job_id is not None:
            killed_job = await asyncio.to_thread(fleet.finished, job_id)
    for name, harm in (("flushall", fleet.flush_index), ("kill-everything", fleet.kill_everything)):
        steps.append(await under_load(fleet, name, harm, expected, options))
    return steps, killed_job_facts(fleet, killed_job)


def start_long_job(fleet: Fleet, options: argparse.Namespace) -> str:
    """Start a job and return once it has a checkpoint to go on from."""
    job_id = fleet.create_job("long", epochs=options.killed_job_epochs, seed=0)
    wait_for(lambda: len(fleet.client.fine_tuning.jobs.checkpoints.list(job_id).data) > 0, JOB_SECONDS)
    return job_id


def killed_job_facts(fleet: Fleet, job: Json) -> Json:
    """Return what shows that a job went on: its attempts, its versions and where it was taken up again."""
    warnings = [event for event in fleet.events(job) if event["level"] == "warn"]
    return {
        "status": job["status"],
        "attempts": job["lorafleet"]["attempts"],
        "versions": fleet.listing()["adapters"]["long"]["num_versions"],
        "taken_up_again_at_steps": [event["data"]["step"] for event in warnings if "step" in event["data"]],
        "total_steps": job["lorafleet"]["progress"]["total_steps"],
    }


async def under_load(
    fleet: Fleet, name: str, harm: Callable[[], None], expected: dict[Ask, str], options: argparse.Namespace
) -> Step:
    """Do one harm in the middle of a load, and look at what came of it."""
    before = await asyncio.to_thread(fleet.listing)
    async with AsyncOpenAI(base_url=fleet.base_url, api_key=fleet.api_key, timeout=ANSWER_SECONDS) as client:
        load = Load(client, tuple(expected))
        running = asyncio.create_task(load.run(options.streams))
        await asyncio.sleep(options.seconds)
        harmed_at = time.monotonic()
        await asyncio.to_thread(harm)
        whole_at = time.monotonic()
        await asyncio.sleep(options.seconds)
        load.stop()
        await running
    step = step_of(name, load, expected, harmed_at)
    step.whole_again_seconds = whole_at - harmed_at
    step.changed = differences(before, await asyncio.to_thread(fleet.listing))
    step.answers_unchanged = await asyncio.to_thread(fleet.answers, tuple(expected)) == expected
    step.writes_work = await asyncio.to_thread(fleet.write, f"after-{name}")
    print_step(step)
    return step


def step_of(name: str, load: Load, expected: dict[Ask, str], harmed_at: float) -> Step:
    """Return the figures of a load in which harm was done at `harmed_at`."""
    good = [outcome for outcome in load.outcomes if outcome.error is None]
    sent_after = [outcome.ended_at for outcome in good if outcome.began_at >= harmed_at]
    ends = [harmed_at, *sorted(outcome.ended_at for outcome in good if outcome.ended_at >= harmed_at)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return Step(
        name,
        ok=len(good),
        failed=dict(Counter(outcome.error for outcome in load.outcomes if outcome.error is not None)),
        failed_whole=dict(
            Counter(
                outcome.error
                for outcome in load.outcomes
                if outcome.error is not None and not outcome.ask.is_streamed
            )
        ),
        hung=load.hung,
        wrong_answers=sum(outcome.text != expected[outcome.ask] for outcome in good),
        first_success_seconds=min(sent_after) - harmed_at if sent_after else None,
        longest_gap_seconds=max(gaps, default=None),
    )


def differences(before: dict[str, Json], after: dict[str, Json]) -> list[str]:
    """Return `kind id` of all that is listed otherwise than before; what ended meanwhile may have changed."""
    changed = []
    for kind in before:
        for key in before[kind].keys() | after[kind].keys():
            old, new = before[kind].get(key, "absent"), after[kind].get(key, "absent")
            if old is not None and old != new:
                changed.append(f"{kind} {key}: {brief(old)} is now {brief(new)}")
    return sorted(changed)


def report(options: argparse.Namespace, steps: list[Step], job: Json, *, different_models: int) -> None:
    """Print everything as JSON and exit with 1 unless all of it is as it should be."""
    resumed_at = job["taken_up_again_at_steps"]
    job_went_on = (
        job["status"] == "succeeded"
        and job["attempts"] >= 2
        and job["versions"] == 1
        and bool(resumed_at)
        and min(resumed_at) >= CHECKPOINT_STEPS
    )
    is_intact = job_went_on and all(step.is_intact for step in steps)
    result = {
        "bench": "kills_under_load",
        "base": options.base.name if options.base else "bundled",
        "streams": options.streams,
        "different_models": different_models,
        "killed_job": job,
        "steps": [rounded(asdict(step)) for step in steps],
        "is_intact": is_intact,
    }
    print(json.dumps(result))
    sys.exit(0 if is_intact else 1)


def print_step(step: Step) -> None:
    print(
        f"{step.name:16} ok {step.ok:5}  failed {step.failed}  hung {step.hung}  wrong {step.wrong_answers}  "
        f"first success {seconds(step.first_success_seconds)}  gap {seconds(step.longest_gap_seconds)}  "
        f"whole {seconds(step.whole_again_seconds)}  {'intact' if step.is_intact else 'NOT INTACT'}",
        flush=True,
    )
    for change in step.changed:
        print(f"  {change}", flush=True)


def brief(value: Any) -> str:
    return str(value)[:LONGEST_SHOWN]


def seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


def rounded(facts: Json) -> Json:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in facts.items()}


def completion(ask: Ask) -> Json:
    return {"model": ask.model, "prompt": ask.prompt, "max_tokens": 24, "temperature": 0}


def training_rows(template: str) -> bytes:
    """Return rows of training data as JSON lines: what to say of item 0, item 1 and so on."""
    rows = [
        {"prompt": f"item {number}\n", "completion": template.format(number)}
        for number in range(TRAINING_ROWS)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def error_name(error: Exception) -> str:
    """Return the error's class, with the API's own code where it has one."""
    code = getattr(error, "code", None)
    return f"{type(error).__name__}:{code}" if code else type(error).__name__


def lorafleet(*arguments: str) -> Json:
    """Run the command line with --json and return what it printed."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    if done.returncode != 0:
        raise RuntimeError(f"lorafleet {' '.join(arguments)}: {answer}")
    return answer


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come to pass within {seconds:g} seconds")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
