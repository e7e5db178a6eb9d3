"""The demo's story: train, evaluate, serve mixed; all of it through the public HTTP API."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lorafleet.api import Api, Json
from lorafleet.demo.report import Agreement, Load, Report, TaskResult, load_of
from lorafleet.demo.traffic import Answer, Ask, Round, Traffic
from lorafleet.following import follow
from lorafleet.tasks import Row, Task, TaskError, write_rows
from services.common import scoring

# What suits a base of a few million parameters; bigger ones want a tenth of this learning rate.
RANK = 16
LEARNING_RATE = 4e-3
BATCH_SIZE = 4
# Evaluation here asks the served model; the trainer's own only guards against a broken run.
_VALIDATION_FRACTION = 0.05
_EVALUATION_ROWS = 0

STREAMS = 16
ASKS_OF_A_MODEL = 4
BURST = 24
BASE_LOAD_SECONDS = 6.0
MIXED_LOAD_SECONDS = 12.0
# Drops a version, `name:3`, from the inference service's memory and disk.
Evict = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much the demo does."""

    epochs: int
    max_seq_len: int
    seed: int
    work_folder: Path


@dataclass(frozen=True, slots=True)
class Trained:
    """A task and the job that trained its adapter."""

    task: Task
    job: Json

    @property
    def model(self) -> str:
        """The version that the job made, as the HTTP API calls it."""
        return str(self.job["fine_tuned_model"])

    @property
    def version_ref(self) -> str:
        """The version, as the registry calls it."""
        return f"{self.task.adapter}:{self.job['lorafleet']['version']}"


def run_demo(
    base_url: str, api_key: str, tasks: Sequence[Task], plan: Plan, evict: Evict, console: Console
) -> Report:
    """Run the whole demo against a fleet that is up, telling on `console` what is going on.

    Raises:
        ApiError: a call failed.
        TaskError: a job did not succeed.
    """
    clock = _Clock()
    with Api(base_url, api_key) as api:
        base = api.base_name()
        console.print(f"[bold]1. fine-tuning {len(tasks)} adapters of {base}[/]")
        trained = _train(api, base, tasks, plan, console)
        clock.lap("training")
    return asyncio.run(_measure(base_url, api_key, base, trained, plan, evict, console, clock))


async def _measure(
    base_url: str,
    api_key: str,
    base: str,
    trained: Sequence[Trained],
    plan: Plan,
    evict: Evict,
    console: Console,
    clock: _Clock,
) -> Report:
    async with Traffic.to(base_url, api_key) as traffic:
        console.print("[bold]2. evaluating the base and the adapters on test rows[/]")
        results = [await _evaluate(traffic, base, one) for one in trained]
        clock.lap("evaluation")
        console.print(
            f"[bold]3. serving the base and {len(trained)} adapters, mixed, in {STREAMS} streams[/]"
        )
        loads, agreement = await _serve(traffic, base, trained, evict, plan.seed)
        clock.lap("serving")
    return Report(base, tuple(results), loads, agreement, clock.laps)


class _Clock:
    """Times the parts of the demo."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began_at = time.monotonic()

    def lap(self, name: str) -> None:
        """Note how long it is since the last lap."""
        now = time.monotonic()
        self.laps[name] = now - self._began_at
        self._began_at = now


def _train(api: Api, base: str, tasks: Sequence[Task], plan: Plan, console: Console) -> list[Trained]:
    requests = [_job_request(api, base, task, plan) for task in tasks]
    # Created at the same moment, they wait in the queue together, and so they train together.
    with ThreadPoolExecutor(len(requests)) as at_once:
        jobs = list(at_once.map(api.create_job, requests))
    jobs = follow(api, [job["id"] for job in jobs], console)
    for task, job in zip(tasks, jobs, strict=True):
        if job["status"] != "succeeded":
            reason = job["error"]["message"] if job["error"] else job["status"]
            raise TaskError(f"fine-tuning on {task.name} did not succeed: {reason}")
    return [Trained(task, job) for task, job in zip(tasks, jobs, strict=True)]


def _job_request(api: Api, base: str, task: Task, plan: Plan) -> Json:
    file = plan.work_folder / f"{task.name}.jsonl"
    write_rows(task.train, file)
    options = {
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "max_seq_len": plan.max_seq_len,
        "overlong_policy": "drop",
        "validation_fraction": _VALIDATION_FRACTION,
        "evaluation_rows": _EVALUATION_ROWS,
    }
    return {
        "model": base,
        "training_file": api.upload(file),
        "suffix": task.adapter,
        "seed": plan.seed,
        "method": {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": plan.epochs, "batch_size": BATCH_SIZE},
                "lorafleet": options,
            },
        },
    }


async def _evaluate(traffic: Traffic, base: str, trained: Trained) -> TaskResult:
    task, job = trained.task, trained.job
    targets = [row.target for row in task.test]
    before = await _texts(traffic, base, task)
    after = await _texts(traffic, trained.model, task)
    dataset = job["lorafleet"]["dataset"] or {}
    return TaskResult(
        task=task.name,
        metric=task.metric.name,
        base=scoring.score(task.metric, before, targets),
        adapter=scoring.score(task.metric, after, targets),
        lift=scoring.lift(task.metric, before, after, targets),
        train_rows=len(task.train),
        train_rows_left_out=task.rows_left_out,
        train_rows_too_long=int(dataset.get("overlong_rows") or 0),
        test_rows=len(task.test),
        training_seconds=float(job["finished_at"] - job["lorafleet"]["started_at"]),
        model=trained.model,
    )


async def _texts(traffic: Traffic, model: str, task: Task) -> list[str]:
    answers = await traffic.ask_all([_ask(model, task, row) for row in task.test], at_once=STREAMS)
    return [answer.text for answer in answers]


def _ask(model: str, task: Task, row: Row) -> Ask:
    return Ask(model, row.prompt, task.max_answer_tokens, tuple(task.stop))


async def _serve(
    traffic: Traffic, base: str, trained: Sequence[Trained], evict: Evict, seed: int
) -> tuple[tuple[Load, ...], Agreement]:
    """Ask one at a time, then the base in many streams, then everything mixed; compare the answers.

    Between them, the same burst of requests to one adapter and to all of them, cold and then warm.
    """
    rows = [(one, row) for one in trained for row in one.task.test[:ASKS_OF_A_MODEL]]
    of_base = [_ask(base, one.task, row) for one, row in rows]
    # Every model as often as any other: the base gets a share of the rows.
    mixed = [_ask(one.model, one.task, row) for one, row in rows] + of_base[:: len(trained)]
    random.Random(seed).shuffle(mixed)  # noqa: S311 - an order of requests, no secret
    alone = [await traffic.ask(ask) for ask in mixed]
    base_only = await traffic.keep_asking(of_base, at_once=STREAMS, seconds=BASE_LOAD_SECONDS)
    # Alone, the adapter with the longest answers: of one token there is no rate.
    longest = max(trained, key=lambda one: one.task.max_answer_tokens)
    bursts = [load for some in ([longest], trained) for load in await _cold_and_warm(traffic, some, evict)]
    together = await traffic.keep_asking(mixed, at_once=STREAMS, seconds=MIXED_LOAD_SECONDS)
    loads = (
        load_of("one at a time", Round(alone), streams=1),
        load_of("base only", base_only, streams=STREAMS),
        *bursts,
        load_of(f"base + {len(trained)} adapters", together, streams=STREAMS),
    )
    return loads, _agreement(alone, together.answers)


async def _cold_and_warm(traffic: Traffic, trained: Sequence[Trained], evict: Evict) -> list[Load]:
    """Send one burst of requests to adapters that inference has nothing of, and once more.

    Cold, an adapter is fetched from the registry, checked, parsed and copied before its first token.
    """
    for one in trained:
        await asyncio.to_thread(evict, one.version_ref)
    rows = [
        _ask(one.model, one.task, row) for one in trained for row in one.task.test[: BURST // len(trained)]
    ]
    name = "1 adapter" if len(trained) == 1 else f"{len(trained)} adapters"
    return [
        load_of(f"{name}, {state}", Round(await traffic.ask_all(rows, at_once=STREAMS)), streams=STREAMS)
        for state in ("cold", "warm")
    ]


def _agreement(alone: Sequence[Answer], together: Sequence[Answer]) -> Agreement:
    expected = {answer.ask: answer.text for answer in alone}
    equal = sum(answer.text == expected[answer.ask] for answer in together)
    return Agreement(equal=equal, total=len(together))
