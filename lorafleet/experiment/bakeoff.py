"""The bake-off's story: fine-tune, repeat what collapsed, serve everything together, score, tabulate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafleet.api import Api, Json
from lorafleet.experiment import table
from lorafleet.experiment.executor import FleetExecutor
from lorafleet.experiment.experiment import Standing, run_experiment
from lorafleet.experiment.heuristics import heuristics_of
from lorafleet.experiment.ledger import Ledger
from lorafleet.experiment.line import Line, has_collapsed, line_of
from lorafleet.experiment.manifest import Manifest
from lorafleet.experiment.plan import Cell, retry_of
from lorafleet.experiment.plot import write_correlations, write_plot
from lorafleet.experiment.served import Replies, asks_of
from lorafleet.experiment.serving import ServingStanding, serve_all
from lorafleet.experiment.summary import settle


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told how the two parts stand."""

    training: Callable[[Standing], None]
    serving: Callable[[ServingStanding], None]


@dataclass(frozen=True, slots=True)
class Found:
    """What an experiment found: its lines, and everything as one JSON object."""

    lines: list[Line]
    json: dict[str, Any]


def run_bakeoff(
    base_url: str, api_key: str, manifest: Manifest, cells: Sequence[Cell], folder: Path, watcher: Watcher
) -> Found:
    """Carry out all runs against a fleet that is up, and leave the table in `folder`.

    Raises:
        ApiError: the fleet refused something other than a run, or did not answer for minutes.
        LedgerError: `folder` holds another experiment.
    """
    with Api(base_url, api_key) as api:
        with Ledger(folder / "ledger.jsonl", manifest.name) as ledger:
            done = fine_tune(cells, FleetExecutor(api), ledger, manifest, watcher.training)
        made = [(cell, outcome) for cell, outcome in done if outcome.get("fine_tuned_model")]
        asks = [asks_of(cell, str(outcome["fine_tuned_model"])) for cell, outcome in made]
        asks += [asks_of(cell, cell.base) for cell, _ in made]
        with Replies(folder / "answers.jsonl") as replies:
            at_once = manifest.requests_at_once
            asyncio.run(serve_all(base_url, api_key, asks, replies, at_once=at_once, show=watcher.serving))
            lines = tabulate(done, replies, adapter_bytes(api))
    return _written(
        manifest.name, lines, {cell.task.name: heuristics_of(cell.task) for cell in cells}, folder
    )


def fine_tune(
    cells: Sequence[Cell],
    executor: FleetExecutor,
    ledger: Ledger,
    manifest: Manifest,
    show: Callable[[Standing], None],
) -> list[tuple[Cell, Json]]:
    """Carry out the runs, and once more, by a changed recipe, those that collapsed."""
    runs_at_once = manifest.runs_at_once
    outcomes = run_experiment(cells, executor, ledger, runs_at_once=runs_at_once, show=show)
    done = list(zip(cells, outcomes, strict=True))
    if manifest.retry_collapsed is None:
        return done
    change = manifest.retry_collapsed
    again = [retry_of(cell, change) for cell, outcome in done if has_collapsed(outcome)]
    outcomes = run_experiment(again, executor, ledger, runs_at_once=runs_at_once, show=show)
    return done + list(zip(again, outcomes, strict=True))


def tabulate(done: Sequence[tuple[Cell, Json]], replies: Replies, bytes_of: dict[str, int]) -> list[Line]:
    """Return the line of each run, marked with whether it counts."""
    lines = []
    for cell, outcome in done:
        model = str(outcome.get("fine_tuned_model") or "")
        base = replies.of(asks_of(cell, cell.base)) if model else ()
        adapter = replies.of(asks_of(cell, model)) if model else ()
        digest = str((outcome.get("lorafleet") or {}).get("digest"))
        lines.append(line_of(cell, outcome, base, adapter, adapter_bytes=bytes_of.get(digest)))
    stands = settle(lines)
    first_key = [f"{line.base}/{line.task}/{line.retry_of or line.recipe}" for line in lines]
    return [
        replace(line, stands=stands.get(key, line.recipe) == line.recipe)
        for key, line in zip(first_key, lines, strict=True)
    ]


def adapter_bytes(api: Api) -> dict[str, int]:
    """Return the size of the newest version of each adapter, by the version's digest."""
    newest = [adapter["latest_version"] for adapter in api.adapters() if adapter.get("latest_version")]
    return {
        str(version["digest"]): sum(int(file["size_bytes"]) for file in version["files"])
        for version in newest
    }


def _written(name: str, lines: list[Line], heuristics: dict[str, dict[str, float]], folder: Path) -> Found:
    found = table.as_json(name, lines, heuristics)
    (folder / "table.csv").write_text(table.as_csv(lines, heuristics), encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    write_plot(name, lines, folder / "table.svg")
    write_correlations(found["correlations"], folder / "correlations.svg")
    return Found(lines, found)
