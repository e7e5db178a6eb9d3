"""What a fleet in containers keeps through restarts; `compose_up.sh` runs it. The last line is JSON.

A key is made, an adapter trained and served through both doors. Then each container is restarted in turn, the
trainer's in the middle of a job, and at last all are taken down and brought up again. After each step models,
adapters, versions, aliases, jobs, events and files must be listed as before, greedy answers must be the same
to the letter, and the job that lost its trainer must have made one version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openai import OpenAI, OpenAIError

from lorafleet.client import Client

CONTAINERS = ("redis", "minio", "registry", "inference", "gateway", "trainer")
BASE = "lorafleet-5m"
TENANT = "acme"
TRAINING_ROWS = 24
CHECKPOINT_STEPS = 10
PROMPTS = ("item 3\n", "item 17\n")
ENDED = {"succeeded", "failed", "cancelled"}
# Far more than an idle machine takes.
READY_SECONDS = 900.0
JOB_SECONDS = 1800.0
CALL_SECONDS = 120.0
POLL_SECONDS = 0.5

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Compose:
    """The command that runs the containers."""

    command: tuple[str, ...]
    up_arguments: tuple[str, ...]

    def run(self, *arguments: str) -> str:
        """Run one verb and return what it printed; raises `CalledProcessError` when it fails."""
        done = subprocess.run([*self.command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout

    def up(self) -> None:
        self.run(*self.up_arguments)

    def create_key(self) -> str:
        command = ("python", "-m", "services.gateway", "create-key", "--tenant", TENANT)
        return self.run("exec", "-T", "gateway", *command).split()[-1]


class Fleet:
    """The fleet behind its two doors."""

    def __init__(self, api_key: str) -> None:
        url = f"http://127.0.0.1:{os.environ['PORT']}/v1"
        self._grpc_target = f"127.0.0.1:{os.environ['GRPC_PORT']}"
        self._api_key = api_key
        self.client = OpenAI(base_url=url, api_key=api_key, timeout=CALL_SECONDS)

    def wait_until_answering(self) -> None:
        """Wait until an adapter's version, a job and a file can be read and the base answers."""

        def answers() -> bool:
            try:
                self.listing()
                self.answer(BASE, PROMPTS[0])
            except OpenAIError:
                return False
            return True

        wait_for(answers, READY_SECONDS)

    def listing(self) -> dict[str, Json]:
        """Return everything that must outlive a container, by kind and id."""
        jobs = [job.to_dict() for job in self.client.fine_tuning.jobs.list(limit=100)]
        ended = {str(job["id"]): job for job in jobs if job["status"] in ENDED}
        adapters = {adapter["id"]: adapter for adapter in self._all("/adapters")}
        return {
            "models": {model.id: model.to_dict() for model in self.client.models.list()},
            "adapters": adapters,
            "versions": {name: self._all(f"/adapters/{name}/versions") for name in adapters},
            "alias_moves": {
                f"{name}@{alias['name']}": self._all(f"/adapters/{name}/aliases/{alias['name']}/history")
                for name, adapter in adapters.items()
                for alias in adapter["aliases"]
            },
            "jobs": ended,
            "events": {job_id: self._events(job_id) for job_id in ended},
            "files": {
                file.id: hashlib.sha256(self.client.files.content(file.id).read()).hexdigest()
                for file in self.client.files.list()
            },
        }

    def answer(self, model: str, prompt: str) -> str:
        done = self.client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
        return done.choices[0].text

    def answers(self, models: tuple[str, ...]) -> dict[str, str]:
        """Return greedy answers through both doors, which must agree."""
        answers = {f"{model} {prompt}": self.answer(model, prompt) for model in models for prompt in PROMPTS}
        with Client(self._grpc_target, api_key=self._api_key) as client:
            for adapter in models[1:3]:
                over_grpc = client.inference.generate(PROMPTS[0], model=adapter, max_tokens=16, temperature=0)
                assert over_grpc.text == answers[f"{adapter} {PROMPTS[0]}"], "the doors disagree"
        return answers

    def create_job(self, adapter: str, *, epochs: int) -> str:
        rows = "".join(
            json.dumps({"prompt": f"item {number}\n", "completion": f"{adapter} has {number}\n"}) + "\n"
            for number in range(TRAINING_ROWS)
        )
        file = self.client.files.create(file=(f"{adapter}.jsonl", rows.encode()), purpose="fine-tune")
        options = {"rank": 8, "learning_rate": 4e-3, "checkpoint_steps": CHECKPOINT_STEPS}
        method = {
            "type": "supervised",
            "supervised": {
                "hyperparameters": {"n_epochs": epochs, "batch_size": 4},
                "lorafleet": options,
            },
        }
        body = {"model": BASE, "training_file": file.id, "suffix": adapter, "seed": 0, "method": method}
        job = self.client.post("/fine_tuning/jobs", cast_to=object, body=body)
        assert isinstance(job, dict)
        return str(job["id"])

    def finished(self, job_id: str) -> Json:
        """Wait for the end of a job and return it; failed polls are asked again."""

        def is_over() -> bool:
            try:
                return self.client.fine_tuning.jobs.retrieve(job_id).status in ENDED
            except OpenAIError:
                return False

        wait_for(is_over, JOB_SECONDS)
        job = self.client.fine_tuning.jobs.retrieve(job_id).to_dict()
        assert job["status"] == "succeeded", job["error"]
        return job

    def has_checkpoint(self, job_id: str) -> bool:
        return bool(self.client.fine_tuning.jobs.checkpoints.list(job_id).data)

    def set_alias(self, adapter: str, alias: str, version: int) -> None:
        self.client.put(f"/adapters/{adapter}/aliases/{alias}", cast_to=object, body={"version": version})

    def _events(self, job_id: str) -> list[Json]:
        return [event.to_dict() for event in self.client.fine_tuning.jobs.list_events(job_id, limit=100)]

    def _all(self, path: str) -> list[Json]:
        page = self.client.get(path, cast_to=object, options={"params": {"limit": 100}})
        assert isinstance(page, dict)
        assert not page.get("has_more"), f"{path} has more than a page"
        return list(page["data"])


def main() -> int:
    """Train, serve, restart everything in turn and report; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compose", default="docker compose", help="the command that runs the containers")
    parser.add_argument("--up", default="up -d --wait", help="its words to bring everything up")
    options = parser.parse_args()
    compose = Compose(tuple(shlex.split(options.compose)), tuple(shlex.split(options.up)))
    fleet = Fleet(compose.create_key())
    say("a key was made")
    models = train_and_serve(fleet)
    expected, answers = fleet.listing(), fleet.answers(models)
    steps = [restart(compose, fleet, name, expected, answers, models) for name in CONTAINERS[:-1]]
    steps += restart_trainer(compose, fleet, models)
    steps.append(down_and_up(compose, fleet, models))
    lost = [step["step"] for step in steps if step["changed"] or not step["same_answers"]]
    sys.stdout.write(json.dumps({"check": "compose", "steps": steps, "lost": lost}) + "\n")
    return 1 if lost else 0


def train_and_serve(fleet: Fleet) -> tuple[str, ...]:
    """Publish one adapter under an alias; return the models that answer."""
    job = fleet.finished(fleet.create_job("codes", epochs=4))
    fleet.set_alias("codes", "prod", 1)
    say(f"trained and published {job['fine_tuned_model']}")
    models = (BASE, "codes", "codes@prod", str(job["fine_tuned_model"]))
    answers = fleet.answers(models[:2])
    assert answers[f"{BASE} {PROMPTS[0]}"] != answers[f"codes {PROMPTS[0]}"], "the adapter changes nothing"
    say(f"served: codes says {answers[f'codes {PROMPTS[0]}']!r}")
    return models


def restart(
    compose: Compose,
    fleet: Fleet,
    name: str,
    expected: Json,
    answers: dict[str, str],
    models: tuple[str, ...],
) -> Json:
    """Restart one container and look at what is there after it."""
    began_at = time.monotonic()
    compose.run("restart", name)
    return looked_at(fleet, f"restart {name}", began_at, expected, answers, models)


def restart_trainer(compose: Compose, fleet: Fleet, models: tuple[str, ...]) -> list[Json]:
    """Restart the trainer in the middle of a job, which must go on and publish once."""
    expected, answers = fleet.listing(), fleet.answers(models)
    job_id = fleet.create_job("long", epochs=20)
    wait_for(lambda: fleet.has_checkpoint(job_id), JOB_SECONDS)
    began_at = time.monotonic()
    compose.run("restart", "trainer")
    job = fleet.finished(job_id)
    say(f"the job that lost its trainer: {job['status']} at attempt {job['lorafleet']['attempts']}")
    versions = fleet.listing()["versions"]["long"]
    assert len(versions) == 1, f"{len(versions)} versions of one job"
    assert job["lorafleet"]["attempts"] >= 2, "the job ended before its trainer did"
    return [looked_at(fleet, "restart trainer", began_at, expected, answers, models)]


def down_and_up(compose: Compose, fleet: Fleet, models: tuple[str, ...]) -> Json:
    """Remove every container and bring the fleet up again on its volumes."""
    expected, answers = fleet.listing(), fleet.answers(models)
    began_at = time.monotonic()
    compose.run("down")
    compose.up()
    return looked_at(fleet, "down and up", began_at, expected, answers, models)


def looked_at(
    fleet: Fleet, step: str, began_at: float, expected: Json, answers: dict[str, str], models: tuple[str, ...]
) -> Json:
    """Wait until the fleet answers, compare, and return what a step did."""
    fleet.wait_until_answering()
    whole_seconds = round(time.monotonic() - began_at, 1)
    changed = missing_from(expected, fleet.listing())
    same_answers = fleet.answers(models) == answers
    say(f"{step}: whole after {whole_seconds} s, {'lost ' + str(changed) if changed else 'nothing lost'}")
    return {"step": step, "whole_seconds": whole_seconds, "changed": changed, "same_answers": same_answers}


def missing_from(expected: Json, now: Json) -> list[str]:
    """Return `kind id` of all that was there and is gone or other than it was."""
    return [
        f"{kind} {key}"
        for kind, things in expected.items()
        for key, thing in things.items()
        if now[kind].get(key) != thing
    ]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come to pass within {seconds:g} seconds")
        time.sleep(POLL_SECONDS)


def say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
