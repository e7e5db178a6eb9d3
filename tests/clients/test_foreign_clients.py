"""Clients that others wrote, unmodified and each in an environment of its own, against a real fleet.

What they get is compared with what our own client gets over gRPC, to the letter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from lorafleet.client import Client
from lorafleet.client.generation import Completion
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.state import StateFolder
from lorafleet.inference.v1.generation_pb2 import ChatMessage
from services.gateway.keys import Scope
from tests.support.client_environment import SCRIPTS, run_client
from tests.support.models import make_peft_adapter, make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BASE, ADAPTER, PUSHED = "tiny", "numbers", "pushed"
PROMPT = "say 3\n"
MAX_TOKENS = 12
# Used up by as many requests; another one every six seconds after that.
REQUESTS_PER_MINUTE = 10
ROWS = [{"prompt": f"say {number}\n", "completion": f"number {number}"} for number in range(24)]


def lorafleet(*arguments: str) -> dict[str, Any]:
    """Run the command line with --json and return what it printed."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@dataclass
class Place:
    """A fleet with two adapters, and our own client of it."""

    base_url: str
    key: str
    base_path: Path
    ours: Client
    stock: OpenAI

    def facts(self, **more: Any) -> dict[str, Any]:
        """What a foreign client is told."""
        root_url = self.base_url.removesuffix("/v1")
        names = {"adapter": ADAPTER, "base": BASE, "pushed": PUSHED}
        return {"base_url": self.base_url, "root_url": root_url, "key": self.key, **names, **more} | {
            "prompt": PROMPT
        }

    def limited(self) -> dict[str, Any]:
        """A key of its own that is soon used up."""
        body = {"name": "few", "scopes": [Scope.INFERENCE], "requests_per_minute": REQUESTS_PER_MINUTE}
        made = self.stock.post("/keys", cast_to=object, body=body)
        assert isinstance(made, dict)
        return {"limited_key": made["key"], "requests_per_minute": REQUESTS_PER_MINUTE}

    def completion(self, model: str | None, prompt: str = PROMPT, tokens: int = MAX_TOKENS) -> str:
        """Return our own client's greedy completion of a text."""
        done = self.ours.inference.generate(prompt, model=model, max_tokens=tokens, temperature=0.0)
        return done.text

    def chat(self, model: str | None) -> Completion:
        """Return our own client's greedy answer to a message."""
        message = ChatMessage(role="user", content=PROMPT)
        return self.ours.inference.generate([message], model=model, max_tokens=MAX_TOKENS, temperature=0.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fleet")
    state = ("--state", str(folder / "state"))
    base = make_tiny_llama(folder / "base")
    started = lorafleet("up", "--base", str(base), "--base-name", BASE, *state)
    try:
        config = FleetConfig.load(StateFolder(folder / "state"))
        assert config is not None
        with (
            Client(config.grpc_target, started["api_key"]) as ours,
            OpenAI(base_url=started["base_url"], api_key=started["api_key"], timeout=60) as stock,
        ):
            train(stock)
            adapter = make_peft_adapter(base, folder / "adapter", r=4, seed=1)
            lorafleet("push", str(adapter), "--name", PUSHED, *state)
            yield Place(started["base_url"], started["api_key"], base, ours, stock)
    finally:
        lorafleet("down", *state)


def train(client: OpenAI) -> None:
    """Fine-tune the adapter as a stock client does."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    file = client.files.create(file=("rows.jsonl", lines), purpose="fine-tune")
    # A rate at which a handful of steps changes what a random base answers.
    supervised: Any = {
        "hyperparameters": {"n_epochs": 1, "batch_size": 4},
        "lorafleet": {"learning_rate": 0.01},
    }
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix=ADAPTER,
        seed=1,
        method={"type": "supervised", "supervised": supervised},
    )
    deadline = time.monotonic() + 200
    while (ended := client.fine_tuning.jobs.retrieve(job.id)).status not in {"succeeded", "failed"}:
        assert time.monotonic() < deadline, "the job does not end"
        time.sleep(0.5)
    assert ended.status == "succeeded", ended.error


def check_chat(place: Place, said: dict[str, Any], *, counts: dict[str, str]) -> None:
    """Check what both chat clients must have got; `counts` are their names of the token counts."""
    own, base = place.chat(ADAPTER), place.chat(None)
    assert own.text != base.text
    assert said["chat"] == said["streamed"] == own.text
    assert said["batch"] == [own.text] * 3
    assert said["base_chat"] == base.text
    assert said["completion"] == place.completion(ADAPTER)
    assert said["num_chunks"] > 1
    assert said["finish_reason"] == own.finish_reason
    for usage in (said["usage"], said["streamed_usage"]):
        assert usage[counts["completion"]] == own.completion_tokens > 0
        assert usage[counts["prompt"]] == own.prompt_tokens > len(PROMPT)
        assert usage["total_tokens"] == own.prompt_tokens + own.completion_tokens
    vectors = place.ours.inference.embed(["one", "two words"])
    for given, vector in zip(said["embeddings"], vectors, strict=True):
        assert given == pytest.approx(vector, abs=1e-5)
    # It asked again when it was told to, and not before.
    assert 0.5 < said["waited_seconds"] < 60


def test_langchain(place: Place, tmp_path: Path) -> None:
    said = run_client("langchain", place.facts(**place.limited()), cwd=tmp_path)
    check_chat(place, said, counts={"prompt": "input_tokens", "completion": "output_tokens"})
    assert said["completion_streamed"] == said["completion"]
    assert said["structured"]["grade"] in {"one", "two", "three"}
    assert isinstance(said["structured"]["is_good"], bool)
    errors = {name: (error[0], error[-1]) for name, error in said["errors"].items()}
    assert errors == {
        "absent": ("NotFoundError", "model_not_found"),
        "temperature": ("BadRequestError", "invalid_value"),
        "key": ("AuthenticationError", "invalid_api_key"),
    }
    assert (said["limited"][0], said["limited"][-1]) == ("RateLimitError", "rate_limit_exceeded")


def test_litellm(place: Place, tmp_path: Path) -> None:
    # It would look for a list of prices in the network.
    variables = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    said = run_client("litellm", place.facts(**place.limited()), cwd=tmp_path, **variables)
    check_chat(place, said, counts={"prompt": "prompt_tokens", "completion": "completion_tokens"})
    assert said["errors"] == {
        "absent": ["NotFoundError", 404],
        "temperature": ["BadRequestError", 400],
        "key": ["AuthenticationError", 401],
    }
    assert said["limited"] == ["RateLimitError", 429]


def test_lm_evaluation_harness(place: Place, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number in range(6):
        # White space at its end would be the harness's to move.
        question = f"say {number}:"
        # Every other row expects what the model answers.
        expected = place.completion(ADAPTER, question, 8) if number % 2 else "nothing like it"
        choices = [f"number {number}", f"number {number + 1}", "else"]
        rows.append({"question": question, "choices": choices, "answer": number % 3, "expected": expected})
    tasks = tmp_path / "tasks"
    shutil.copytree(SCRIPTS / "tasks", tasks)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run_client(
        "lm_eval",
        place.facts(tasks=str(tasks), base_path=str(place.base_path)),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    hits = 0
    for sample, row in zip(said["samples"]["pairs_choice"], rows, strict=True):
        scores = place.ours.inference.score(row["question"], row["choices"], model=ADAPTER)
        own = [sum(token.logprob for token in score.tokens) for score in scores]
        assert [float(answer[0]) for answer in sample["answers"]] == pytest.approx(own, abs=1e-3)
        hits += max(range(3), key=own.__getitem__) == row["answer"]
    assert said["results"]["pairs_choice"]["acc,none"] == pytest.approx(hits / len(rows))
    for sample, row in zip(said["samples"]["pairs_generated"], rows, strict=True):
        assert sample["answers"] == [place.completion(ADAPTER, row["question"], 8)]
    assert said["results"]["pairs_generated"]["exact_match,none"] == pytest.approx(0.5)


def test_lorax_client(place: Place, tmp_path: Path) -> None:
    said = run_client("lorax", place.facts(), cwd=tmp_path)
    own = place.ours.inference.generate(
        PROMPT, model=ADAPTER, max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0
    )
    assert said["completion"] == said["streamed"] == said["streamed_text"] == own.text
    assert said["batch"] == [own.text] * 3
    assert said["async_streamed"] == own.text
    assert said["base_completion"] == place.completion(None)
    assert said["pushed_completion"] == place.completion(PUSHED)
    assert len({said["completion"], said["base_completion"], said["pushed_completion"]}) == 3
    assert said["full_text"] == PROMPT + own.text
    assert said["alternatives"] == 3
    assert said["generated_tokens"] == own.completion_tokens > 0
    assert said["finish_reason"] == {"stop": "eos_token", "length": "length"}[own.finish_reason]
    assert said["token_ids"] == own.token_ids
    assert said["logprobs"] == pytest.approx([one.chosen.logprob for one in own.logprobs], abs=1e-4)
    assert said["num_chunks"] == own.completion_tokens
    assert said["sampled"][0] == said["sampled"][1] != own.text
    errors = {name: error[0] for name, error in said["errors"].items()}
    assert errors["absent"] == errors["absent_streamed"] != "UnknownError"
