"""A whole fleet on a tiny base: the stock client's path through it, kill -9 and FLUSHALL."""

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from lorafleet.api import Api
from lorafleet.client import AsyncClient, Client
from lorafleet.client.adapters import AsyncAdapters
from lorafleet.client.generation import AsyncInference
from lorafleet.client.jobs import AsyncJobs
from lorafleet.client.sync import Adapters, Inference, Jobs
from lorafleet.fleet import launch
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus
from lorafleet.trainer.v1.job_pb2 import JOB_STATE_SUCCEEDED, TrainingSpec
from services.common.errors import NotFound
from tests.support.models import make_peft_adapter, make_tiny_llama

BASE = "tiny"
PROCESSES = ("valkey", "registry", "inference", "trainer", "gateway")
ROWS = [{"prompt": f"say {number}\n", "completion": f"number {number}"} for number in range(24)]
ENDED = {"succeeded", "failed", "cancelled"}


def lorafleet(*arguments: str, expected_code: int = 0) -> dict[str, Any]:
    """Run the command line with --json and return what it printed."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == expected_code, f"{arguments}: {done.stdout}\n{done.stderr}"
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


@dataclass
class RunningFleet:
    """A fleet that was started through the command line."""

    state: StateFolder
    client: OpenAI

    def pids(self) -> dict[str, int]:
        """Return the processes that run."""
        status = FleetStatus.load(self.state)
        return {process.name: process.pid for process in (status.processes if status else ()) if process.pid}

    def all_ready(self) -> bool:
        config = FleetConfig.load(self.state)
        assert config is not None
        return set(self.pids()) == set(PROCESSES) and all(launch.readiness(config).values())

    def kill(self, name: str) -> None:
        """Kill a process and wait until the fleet is whole again."""
        killed = self.pids()[name]
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: killed not in self.pids().values())
        wait_for(self.all_ready)

    def finished(self, job_id: str, seconds: float = 60.0) -> FineTuningJob:
        wait_for(lambda: self.client.fine_tuning.jobs.retrieve(job_id).status in ENDED, seconds)
        return self.client.fine_tuning.jobs.retrieve(job_id)

    def create_job(self, suffix: str, epochs: int) -> FineTuningJob:
        lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        file = self.client.files.create(file=("rows.jsonl", lines), purpose="fine-tune")
        # A rate at which a handful of steps changes what a random base answers.
        supervised: Any = {
            "hyperparameters": {"n_epochs": epochs, "batch_size": 4},
            "lorafleet": {"learning_rate": 0.01},
        }
        return self.client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file.id,
            suffix=suffix,
            seed=1,
            method={"type": "supervised", "supervised": supervised},
        )

    def answer(self, model: str) -> str:
        chunks = self.client.completions.create(
            model=model, prompt="say 3\n", max_tokens=12, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    def adapters(self) -> list[dict[str, Any]]:
        with Api(str(self.client.base_url), self.client.api_key) as api:
            return api.adapters()

    def listing(self) -> dict[str, Any]:
        """Everything that is published or recorded, as the API lists it."""
        return {
            "models": sorted(model.id for model in self.client.models.list()),
            "files": sorted(file.id for file in self.client.files.list()),
            "jobs": sorted((job.id, job.status) for job in self.client.fine_tuning.jobs.list()),
            "adapters": self.adapters(),
        }


@dataclass
class Published:
    """A fine-tuned adapter and its greedy answer."""

    job: FineTuningJob
    answer: str


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    state = folder / "state"
    base = make_tiny_llama(folder / "base")
    started = lorafleet("up", "--base", str(base), "--base-name", BASE, "--state", str(state))
    try:
        with OpenAI(base_url=started["base_url"], api_key=started["api_key"], timeout=60) as client:
            yield RunningFleet(StateFolder(state), client)
    finally:
        lorafleet("down", "--state", str(state))


@pytest.fixture(scope="module")
def published(fleet: RunningFleet) -> Published:
    job = fleet.finished(fleet.create_job("numbers", epochs=1).id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    return Published(job, fleet.answer(job.fine_tuned_model))


def test_the_stock_client_goes_the_whole_path(fleet: RunningFleet, published: Published) -> None:
    job = published.job
    assert job.fine_tuned_model == f"ft:{BASE}:default:numbers:v1"
    events = list(fleet.client.fine_tuning.jobs.list_events(job.id))
    steps = [event for event in events if event.type == "metrics"]
    assert steps
    assert any(event.message and "succeeded" in json.dumps(event.to_dict()) for event in events)
    models = {model.id for model in fleet.client.models.list()}
    assert {BASE, "numbers"} <= models
    assert published.answer
    # One version, three names for it.
    assert fleet.answer("numbers") == fleet.answer("numbers:1") == published.answer
    assert fleet.answer(BASE) != published.answer


def test_the_command_line_lists_and_answers(fleet: RunningFleet, published: Published) -> None:
    state = ("--state", str(fleet.state.root))
    listed = lorafleet("list", *state)
    assert listed["base"] == BASE
    assert "numbers" in {adapter["name"] for adapter in listed["adapters"]}
    assert published.job.id in {job["id"] for job in lorafleet("jobs", *state)["data"]}
    answer = lorafleet("run", "numbers", "say 3", "--max-tokens", "12", *state)
    assert answer == {"model": "numbers", "text": published.answer}
    refused = lorafleet("run", "absent", "say 3", *state, expected_code=1)
    assert refused["error"]["code"] == "model_not_found"


def test_a_pushed_adapter_is_named_compared_rolled_back_and_fetched(
    fleet: RunningFleet, published: Published, tmp_path: Path
) -> None:
    state = ("--state", str(fleet.state.root))
    config = FleetConfig.load(fleet.state)
    assert config is not None
    folders = [make_peft_adapter(config.base_path, tmp_path / f"v{seed}", r=4, seed=seed) for seed in (1, 2)]
    versions = [lorafleet("push", str(folder), "--name", "pushed", *state) for folder in folders]
    assert [version["version"] for version in versions] == [1, 2]
    for version in (1, 2):
        moved = lorafleet("alias", "pushed", "prod", str(version), *state)
        assert (moved["version"], moved["generation"]) == (version, str(version))
    of_both = [lorafleet("run", f"pushed:{n}", "say 3", "--max-tokens", "8", *state)["text"] for n in (1, 2)]
    assert of_both[0] != of_both[1]
    assert lorafleet("run", "pushed@prod", "say 3", "--max-tokens", "8", *state)["text"] == of_both[1]
    assert lorafleet("rollback", "pushed", "prod", *state)["version"] == 1
    assert lorafleet("run", "pushed@prod", "say 3", "--max-tokens", "8", *state)["text"] == of_both[0]

    answers = lorafleet("compare", "pushed:1,pushed:2", "say 3", "--max-tokens", "8", *state)["answers"]
    assert [answer["model"] for answer in answers] == ["base", "pushed:1", "pushed:2"]
    assert [answer["text"] for answer in answers[1:]] == of_both
    assert all(answer["mean_logprob"] < 0 for answer in answers)

    shown = lorafleet("show", "pushed@prod", *state)
    assert shown["digest"] == versions[0]["digest"]
    assert shown["aliases"] == ["prod"]
    assert shown["format"]["max_rank"] == 4
    resident = lorafleet("ps", *state)
    assert {"pushed:1", "pushed:2"} <= {adapter["version_ref"] for adapter in resident["adapters"]}
    assert resident["engine"]["base_model"] == BASE

    lorafleet("pull", "pushed:2", str(tmp_path / "back"), *state)
    for path in folders[1].glob("adapter_*"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert lorafleet("show", "pushed:3", *state, expected_code=1)["error"]["code"] == "version_not_found"
    lorafleet("rm", "pushed:2", *state)
    assert lorafleet("run", "pushed:2", "x", *state, expected_code=1)["error"]["code"] == "adapter_deleted"
    lorafleet("rm", "pushed", "--yes", *state)
    assert lorafleet("show", "pushed", *state, expected_code=1)["error"]["code"] in (
        "adapter_deleted",
        "adapter_not_found",
    )


def test_logs_and_figures(fleet: RunningFleet, published: Published) -> None:
    state = ("--state", str(fleet.state.root))
    events = lorafleet("logs", published.job.id, *state)["data"]
    assert events[-1]["message"] == "The job has successfully completed"
    assert lorafleet("logs", "gateway", *state)["lines"]
    assert lorafleet("logs", "nobody", *state, expected_code=1)["error"]["code"] == "fleet"
    loads = lorafleet("bench", "--streams", "4", "--seconds", "1", "--max-tokens", "4", *state)["loads"]
    assert [load["streams"] for load in loads] == [4, 4]
    assert all(load["tokens_per_second"] > 0 and not load["failures"] for load in loads)


async def test_the_python_clients(fleet: RunningFleet, published: Published, tmp_path: Path) -> None:
    config = FleetConfig.load(fleet.state)
    assert config is not None
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    async with AsyncClient(config.grpc_target, fleet.client.api_key) as client:
        ended = await client.inference.generate("say 3\n", model="numbers", max_tokens=12, temperature=0.0)
        assert (ended.text, ended.version) == (published.answer, "numbers:1")
        pieces = [piece async for piece in client.inference.stream("say 3\n", model="numbers", max_tokens=12)]
        assert pieces[-1].finish_reason
        assert (await client.jobs.get(published.job.id)).result.adapter == "numbers"
        with pytest.raises(NotFound):
            await client.adapters.resolve("absent")

    def blocking() -> None:
        with Client(config.grpc_target, fleet.client.api_key) as client:
            text = "".join(
                piece.text
                for piece in client.inference.stream(
                    "say 3\n", model="numbers", max_tokens=12, temperature=0.0
                )
            )
            assert text == published.answer
            spec = TrainingSpec(n_epochs=1, batch_size=4, rank=4)
            job = client.jobs.create(rows, adapter="by-client", spec=spec, seed=3)
            assert client.jobs.wait(job.id).state == JOB_STATE_SUCCEEDED
            assert [adapter.name for adapter in client.adapters.all(name_contains="by-")] == ["by-client"]
            client.adapters.delete("by-client")

    await asyncio.to_thread(blocking)


def test_the_blocking_client_has_every_call_of_the_other() -> None:
    for blocking, other in ((Adapters, AsyncAdapters), (Jobs, AsyncJobs), (Inference, AsyncInference)):
        own = {name: value for name, value in vars(blocking).items() if not name.startswith("_")}
        theirs = {name: value for name, value in vars(other).items() if not name.startswith("_")}
        assert own.keys() == theirs.keys()
        for name, value in own.items():
            assert inspect.signature(value).parameters == inspect.signature(theirs[name]).parameters, name


def test_a_second_up_finds_the_fleet_running(fleet: RunningFleet) -> None:
    again = lorafleet("up", "--state", str(fleet.state.root))
    assert again["was_running"] is True
    assert again["base_url"] == str(fleet.client.base_url).rstrip("/")
    status = lorafleet("status", "--state", str(fleet.state.root))
    assert {process["name"] for process in status["processes"]} == set(PROCESSES)
    assert all(process["ready"] for process in status["processes"])
    refused = lorafleet("up", "--state", str(fleet.state.root), "--base-name", "other", expected_code=1)
    assert "already runs with another base_name" in refused["error"]["message"]


def test_each_process_comes_back_from_kill_9(fleet: RunningFleet, published: Published) -> None:
    before = fleet.listing()
    for name in PROCESSES:
        fleet.kill(name)
        assert fleet.listing() == before, f"after kill -9 of {name}"
    assert fleet.answer("numbers") == published.answer


def test_a_flushed_index_is_rebuilt(fleet: RunningFleet, published: Published) -> None:
    before = fleet.listing()
    port = json.loads(fleet.state.config_file.read_text())["ports"]["valkey"]
    with redis.Redis(port=port) as index:
        index.flushall()
    assert fleet.listing() == before
    assert fleet.answer("numbers") == published.answer


def test_up_again_after_everything_was_killed(fleet: RunningFleet, published: Published) -> None:
    before = fleet.listing()
    children = list(fleet.pids().values())
    supervisor = lorafleet("up", "--state", str(fleet.state.root))["supervisor_pid"]

    os.kill(supervisor, signal.SIGKILL)

    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in children))
    lorafleet("status", "--state", str(fleet.state.root), expected_code=1)
    again = lorafleet("up", "--state", str(fleet.state.root))
    assert again["was_running"] is False
    assert fleet.listing() == before
    assert fleet.answer("numbers") == published.answer


@pytest.mark.slow
def test_a_job_goes_on_after_its_trainer_was_killed(fleet: RunningFleet, published: Published) -> None:
    job = fleet.create_job("long", epochs=50)
    wait_for(lambda: fleet.client.fine_tuning.jobs.retrieve(job.id).status == "running")
    wait_for(lambda: len(fleet.client.fine_tuning.jobs.list_events(job.id, limit=20).data) > 5)
    fleet.kill("trainer")
    ended = fleet.finished(job.id, seconds=300)
    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model == f"ft:{BASE}:default:long:v1"
    assert ended.model_extra is not None
    assert ended.model_extra["lorafleet"]["attempts"] == 2
    adapters = {adapter["name"]: adapter for adapter in fleet.adapters()}
    assert adapters["long"]["num_versions"] == 1
    assert fleet.answer("numbers") == published.answer
