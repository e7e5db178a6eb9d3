"""The bake-off after training: served answers, lines, wins, correlations, files."""

import asyncio
import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import pytest

from lorafleet.api import ApiError, Json
from lorafleet.experiment import table
from lorafleet.experiment.bakeoff import fine_tune, tabulate
from lorafleet.experiment.executor import FleetExecutor, RunFiles, RunState
from lorafleet.experiment.heuristics import HEURISTICS, heuristics_of
from lorafleet.experiment.ledger import Ledger
from lorafleet.experiment.line import COLUMNS, Line, line_of
from lorafleet.experiment.manifest import Manifest, Recipe
from lorafleet.experiment.plan import Cell
from lorafleet.experiment.plot import write_correlations, write_plot
from lorafleet.experiment.served import Replies, Reply, asks_of
from lorafleet.experiment.serving import ServingStanding, mixed, serve_all
from lorafleet.experiment.summary import correlations, summary
from lorafleet.tasks import Row, Task
from services.common.scoring import Target

LABELS = ("red", "blue", "green", "white")


def cell_of(task: str = "colours", rows: int = 40) -> Cell:
    def part(name: str) -> tuple[Row, ...]:
        return tuple(
            Row(f"{name} {number}: which colour?\n", Target(LABELS[number % len(LABELS)]))
            for number in range(rows)
        )

    loaded = Task(
        name=task,
        title=task,
        metric_name="accuracy",
        train=part("train"),
        test=part("test"),
        rows_left_out=0,
        baselines={"majority_label_accuracy": 0.25, "word_naive_bayes_accuracy": 0.8},
    )
    return Cell("tiny", loaded, "quick", Recipe(n_epochs=1), 7, f"trial-{task}")


def outcome_of(cell: Cell, *, collapsed: bool = False, measured: float = 0.75) -> Json:
    figures = [{"name": "accuracy", "base_value": 0.0, "adapter_value": measured, "rows": 40}]
    facts = {
        "started_at": 100,
        "evaluation": figures,
        "collapsed": collapsed,
        "digest": f"sha256:{cell.adapter}",
    }
    return {
        "status": "succeeded",
        "finished_at": 160,
        "trained_tokens": 99,
        "error": None,
        "fine_tuned_model": f"ft:tiny:default:{cell.adapter}:v1",
        "lorafleet": facts,
    }


def right(cell: Cell, share: float) -> list[Reply]:
    """Answers of which `share` are right."""
    count = round(share * len(cell.task.test))
    texts = [row.target.completion for row in cell.task.test]
    return [Reply(text if number < count else f"no {number}", 1) for number, text in enumerate(texts)]


class Door(BaseHTTPRequestHandler):
    """A completions endpoint that answers with the model's name and notes who asks."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body["model"])
            fault = server.faults.pop(0) if server.faults else None
        if fault:
            status, code = fault
            self._send(status, "application/json", json.dumps({"error": {"code": code, "message": code}}))
            return
        chunks = [
            {"choices": [{"text": f"{body['model']} answers"}]},
            {"choices": [], "usage": {"completion_tokens": 2}},
        ]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self._send(200, "text/event-stream", text)

    def _send(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def a_door(faults: list[tuple[int, str]]) -> Iterator[tuple[str, list[str]]]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    server.asked, server.faults, server.lock = [], faults, Lock()
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve(url: str, asks: list[list[Any]], path: Path, shown: list[ServingStanding] | None = None) -> None:
    with Replies(path) as replies:
        show = (shown if shown is not None else []).append
        asyncio.run(serve_all(url, "key", asks, replies, at_once=4, show=show))


def test_all_models_are_asked_in_turns_and_nothing_twice(tmp_path: Path) -> None:
    cell, path = cell_of(rows=12), tmp_path / "answers.jsonl"
    asks = [asks_of(cell, model) for model in ("a", "b", "base")]
    assert [ask.model for ask in mixed(asks)][:6] == ["a", "b", "base"] * 2
    shown: list[ServingStanding] = []
    with a_door([]) as (url, asked):
        # The base is asked once, however many runs are compared with it.
        serve(url, [*asks, asks[2]], path, shown)
        assert sorted(asked) == sorted(["a", "b", "base"] * 12)
        assert (shown[-1].done, shown[-1].total, shown[-1].models) == (36, 36, 3)
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        del asked[:]
        serve(url, asks, path)
        assert len(asked) == 1
    with Replies(path) as replies:
        assert {reply.text for reply in replies.of(asks[1])} == {"b answers"}


def test_a_refused_row_is_an_empty_answer_and_a_fault_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.experiment.serving._PAUSE_SECONDS", 0.01)
    cell = cell_of(rows=8)
    asks = asks_of(cell, "a")
    with a_door([(503, "unavailable"), (400, "context_length_exceeded")]) as (url, asked):
        serve(url, [asks], tmp_path / "answers.jsonl")
        assert len(asked) == len(asks) + 1
    with Replies(tmp_path / "answers.jsonl") as replies:
        answers = replies.of(asks)
    assert [reply.refusal for reply in answers if reply.refusal] == ["context_length_exceeded"]
    with a_door([(401, "invalid_api_key")] * 9) as (url, _), pytest.raises(ApiError):
        serve(url, [asks], tmp_path / "other.jsonl")


def test_a_line_is_scored_from_what_was_served() -> None:
    cell = cell_of()
    refused = [Reply("", 0, "context_length_exceeded"), *right(cell, 0.0)[1:]]
    line = line_of(cell, outcome_of(cell), refused, right(cell, 0.75), adapter_bytes=1000)
    assert (line.base_score, line.adapter_score, line.lift) == (0.0, 0.75, 0.75)
    assert line.adapter_low is not None
    assert line.adapter_high is not None
    assert line.adapter_low < 0.75 < line.adapter_high
    assert (line.majority, line.minutes, line.adapter_bytes, line.unanswered_rows) == (0.25, 1.0, 1000, 1)
    assert line.agrees
    assert line_of(cell, outcome_of(cell, measured=0.1), refused, right(cell, 0.75)).agrees is False
    assert not line.collapsed
    constant = [Reply("red", 1)] * 40
    assert line_of(cell, outcome_of(cell), refused, constant).collapsed
    failed = {"status": "failed", "error": {"message": "diverged"}, "lorafleet": {"evaluation": []}}
    lost = line_of(cell, failed)
    assert (lost.status, lost.error, lost.lift, lost.agrees) == ("failed", "diverged", None, None)


class Collapsing(FleetExecutor):
    """An executor of which first runs on one task collapse."""

    def __init__(self, task: str) -> None:
        self._task = task
        self.cells: dict[str, Cell] = {}

    def place_files(self, cell: Cell) -> RunFiles:
        return RunFiles("a", "b")

    def submit(self, cell: Cell, files: RunFiles) -> str:
        self.cells[cell.digest] = cell
        return cell.digest

    def state(self, run_id: str) -> RunState:
        cell = self.cells[run_id]
        collapsed = cell.task.name == self._task and not cell.retry_of
        return RunState("succeeded", 1, 1, outcome_of(cell, collapsed=collapsed))


def test_what_collapsed_runs_once_more_and_then_stands(tmp_path: Path) -> None:
    cells, executor = [cell_of("colours"), cell_of("shades")], Collapsing("shades")
    fields = {"name": "trial", "data": tmp_path, "bases": ["tiny"], "tasks": ["colours", "shades"]}
    manifest = Manifest.model_validate(
        {**fields, "recipes": {"quick": {}}, "retry_collapsed": {"n_epochs": 3}}
    )

    def carry_out() -> list[tuple[Cell, Json]]:
        with Ledger(tmp_path / "ledger.jsonl", "trial") as ledger:
            return fine_tune(cells, executor, ledger, manifest, lambda _: None)

    done = carry_out()
    assert [cell.key for cell, _ in done] == [
        "tiny/colours/quick",
        "tiny/shades/quick",
        "tiny/shades/quick-retry",
    ]
    assert carry_out() == done
    with Replies(tmp_path / "answers.jsonl") as replies:
        for cell, outcome in done:
            constant = [Reply("red", 1)] * len(cell.task.test)
            answers = constant if outcome["lorafleet"]["collapsed"] else right(cell, 0.5)
            for ask, reply in zip(asks_of(cell, outcome["fine_tuned_model"]), answers, strict=True):
                replies.add(ask, reply)
            for ask, reply in zip(asks_of(cell, "tiny"), right(cell, 0.1), strict=True):
                replies.add(ask, reply)
        lines = tabulate(done, replies, {"sha256:trial-colours": 123})
    assert [(line.recipe, line.stands, line.collapsed) for line in lines] == [
        ("quick", True, False),
        ("quick", False, True),
        ("quick-retry", True, False),
    ]
    assert [line.adapter_bytes for line in lines] == [123, None, None]
    found = summary(lines)
    assert found["collapsed"] == ["tiny/shades/quick"]
    assert found["retried"] == ["tiny/shades/quick-retry"]
    assert found["bases"]["tiny"]["runs"] == 2


def line(task: str, before: float, adapter: float, **changes: Any) -> Line:
    bare = Line("tiny", task, "quick", "succeeded", "accuracy", before, before - 0.05, before + 0.05)
    scored = replace(
        bare,
        adapter_score=adapter,
        adapter_low=adapter - 0.05,
        adapter_high=adapter + 0.05,
        lift=adapter - before,
        lift_low=adapter - before - 0.08,
        lift_high=adapter - before + 0.08,
    )
    return replace(scored, **changes)


def test_wins_are_counted_strictly_and_ties_apart() -> None:
    lines = [
        line("one", 0.2, 0.9, majority=0.5, naive_bayes=0.95, trainer_adapter_score=0.88),
        line("two", 0.5, 0.5, majority=0.5, trainer_adapter_score=0.7),
        line("three", 0.5, 0.49),
        line("four", 0.5, 0.3),
        line("five", 0.1, 0.9, stands=False),
    ]
    found = summary(lines)
    sums = found["bases"]["tiny"]
    assert sums["against_base"] == {
        "strict_wins": 1, "ties": 1, "losses": 2, "not_inferior": 3, "surely_above": 1, "surely_below": 1,
    }  # fmt: skip
    assert (sums["against_majority"]["strict_wins"], sums["against_majority"]["ties"]) == (1, 1)
    assert sums["against_naive_bayes"]["losses"] == 1
    assert sums["mean_lift"] == pytest.approx((0.7 + 0.0 - 0.01 - 0.2) / 4)
    assert found["served_equals_trained"]["outside"] == ["tiny/two/quick"]
    assert found["served_equals_trained"]["largest_difference"] == pytest.approx(0.2)


def test_the_best_base_of_each_task_is_counted() -> None:
    lines = [line("one", 0.1, 0.9), line("one", 0.1, 0.5, base="big"), line("two", 0.1, 0.4, base="big")]
    found = summary(lines)
    assert [found["bases"][name]["best_of_all_bases_on"] for name in ("tiny", "big")] == [1, 1]


def test_heuristics_tell_tasks_apart_and_correlations_find_what_was_put_in() -> None:
    figures = heuristics_of(cell_of().task)
    assert tuple(figures) == HEURISTICS
    assert len(HEURISTICS) == 14
    assert figures["training_examples"] == 40
    assert figures["output_length_mean"] == 1
    assert figures["input_length_mean"] == 6
    heuristics = {f"t{n}": figures | {"output_length_mean": float(n)} for n in range(5)}
    lines = [line(f"t{n}", 0.1, 0.9 - n / 10) for n in range(5)]
    found = correlations(lines, heuristics)
    assert found["tasks"] == 5
    assert found["pearson"]["average_adapter_score"]["output_length_mean"] == pytest.approx(-1)
    assert found["pearson"]["average_base_score"]["output_length_mean"] is None
    assert found["pearson"]["average_lift"]["training_examples"] is None
    assert found["chance"] == pytest.approx(0.88, abs=0.01)
    assert correlations(lines[:4], heuristics)["pearson"] == {}


def test_the_files_hold_the_table(tmp_path: Path) -> None:
    cells = [cell_of(name) for name in ("one", "two", "three", "four", "five")]
    heuristics = {cell.task.name: heuristics_of(cell.task) for cell in cells}
    lines = [line("one", 0.2, 0.9), line("two", 0.5, 0.5, collapsed=True), line("three", 0.4, 0.5)]
    lines += [line("four", 0.1, 0.2), line("five", 0.1, 0.3)]
    lines.append(Line("tiny", "three", "slow", "failed", "accuracy", error="diverged"))
    rows = list(csv.DictReader(io.StringIO(table.as_csv(lines, heuristics))))
    assert set(rows[0]) == {*COLUMNS, *HEURISTICS}
    assert [row["adapter_score"] for row in rows] == ["0.9", "0.5", "0.5", "0.2", "0.3", ""]
    found = table.as_json("trial", lines, heuristics)
    json.dumps(found, allow_nan=False)
    assert found["failed"] == {"tiny/three/slow": "diverged"}
    write_plot("trial", lines, tmp_path / "table.svg")
    write_correlations(found["correlations"], tmp_path / "correlations.svg")
    # One tick per scored run; text is drawn as shapes, so its ids tell the ticks.
    assert (tmp_path / "table.svg").read_text().count('id="ytick_') == 5
    assert (tmp_path / "correlations.svg").read_text().count('id="ytick_') >= len(HEURISTICS)
    assert "diverged" in table.remark(lines[-1])
