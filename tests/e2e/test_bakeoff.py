"""`lorafleet bakeoff` and `lorafleet demo` against a whole fleet on a tiny base."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import make_tiny_llama

pytestmark = pytest.mark.slow

BASE = "tiny"
COLOURS = ("red", "blue", "green", "white")


def lorafleet(*arguments: str, expected_code: int = 0) -> dict[str, Any]:
    """Run the command line with --json and return what it printed."""
    command = [sys.executable, "-c", "from lorafleet.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == expected_code, f"{arguments}: {done.stdout}\n{done.stderr}"
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def write_task(folder: Path, metric: str, completions: tuple[str, ...]) -> None:
    """A task whose answer is decided by the number in the prompt."""
    folder.mkdir(parents=True)
    card = {"title": folder.name, "task_type": "classification", "metric": metric, "baselines": None}
    (folder / "TASK.json").write_text(json.dumps(card))
    for part, rows in (("train", 24), ("test", 12)):
        lines = [
            json.dumps(
                {"prompt": f"{part} {n} say {n % 4}\n", "completion": completions[n % len(completions)]}
            )
            for n in range(rows)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fleet")
    base = make_tiny_llama(folder / "base")
    lorafleet(
        "up", "--base", str(base), "--base-name", BASE, "--state", str(folder / "state"), "--timeout", "280"
    )
    try:
        yield folder / "state"
    finally:
        lorafleet("down", "--state", str(folder / "state"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "colours", "accuracy", COLOURS)
    write_task(folder / "sentences", "rouge_l", tuple(f"the {colour} one it is" for colour in COLOURS))
    return folder


@pytest.mark.timeout(300)
def test_the_table_is_made_of_what_is_served_and_made_again_from_the_files(
    state: Path, tasks: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "two.yaml"
    manifest.write_text(
        f"name: two\nbases: [{BASE}]\ntasks: [colours, sentences]\n"
        "recipes: {quick: {n_epochs: 1, batch_size: 4, learning_rate: 0.01}}\n"
        "retry_collapsed: {n_epochs: 2}\n"
    )
    command = ("bakeoff", str(manifest), "--data", str(tasks), "--state", str(state))
    found = lorafleet(*command)
    firsts = [line for line in found["lines"] if not line["retry_of"]]
    assert [line["task"] for line in firsts] == ["colours", "sentences"]
    assert all(line["status"] == "succeeded" for line in found["lines"])
    assert all(line["test_rows"] == 12 and line["unanswered_rows"] == 0 for line in found["lines"])
    # Served answers score as the trainer measured on the same rows.
    assert found["served_equals_trained"]["runs"] == 2
    assert found["served_equals_trained"]["outside"] == []
    # Exactly the runs whose adapter the trainer saw collapse were repeated.
    retried = {line["task"] for line in found["lines"] if line["retry_of"]}
    assert {key.split("/")[1] for key in found["retried"]} == retried
    assert all(line["adapter_bytes"] > 0 and line["trained_tokens"] > 0 for line in found["lines"])
    folder = tmp_path / "two-results"
    names = {path.name for path in folder.iterdir()}
    files = ("table.csv", "table.json", "table.svg", "correlations.svg", "ledger.jsonl", "answers.jsonl")
    assert names == set(files)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [row["task"] for row in rows] == [line["task"] for line in found["lines"]]
    kept = {name: (folder / name).read_bytes() for name in ("table.json", "ledger.jsonl", "answers.jsonl")}
    assert lorafleet(*command) == found
    assert kept == {name: (folder / name).read_bytes() for name in kept}


@pytest.mark.timeout(300)
def test_the_demo_measures_cold_and_warm_and_writes_its_page(
    state: Path, tasks: Path, tmp_path: Path
) -> None:
    page = tmp_path / "demo.html"
    found = lorafleet(
        "demo", "--data", str(tasks), "--tasks", "colours,sentences", "--epochs", "1", "--test-rows", "8",
        "--report", str(page), "--state", str(state),
    )  # fmt: skip
    assert [task["task"] for task in found["tasks"]] == ["colours", "sentences"]
    names = [load["name"] for load in found["loads"]]
    assert names == [
        "one at a time", "base only", "1 adapter, cold", "1 adapter, warm", "2 adapters, cold",
        "2 adapters, warm", "base + 2 adapters",
    ]  # fmt: skip
    assert all(not load["failures"] and load["requests"] > 0 for load in found["loads"])
    assert found["agreement"]["equal"] == found["agreement"]["total"] > 0
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in (*names, "colours", "sentences"))
