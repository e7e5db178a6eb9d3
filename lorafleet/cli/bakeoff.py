"""`lorafleet bakeoff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from lorafleet.cli.connection import connect
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, progress, results
from lorafleet.experiment import table
from lorafleet.experiment.executor import FleetExecutor
from lorafleet.experiment.experiment import Standing, run_experiment
from lorafleet.experiment.ledger import Ledger
from lorafleet.experiment.manifest import load_manifest
from lorafleet.experiment.plan import plan
from lorafleet.experiment.plot import write_plot

_SHOWN_RUNS = 12


def bakeoff(
    manifest: Annotated[
        Path, typer.Argument(help="Bases, tasks and recipes, as YAML.", exists=True, dir_okay=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the ledger and the table; NAME-results beside the manifest.", file_okay=False
        ),
    ] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune every task on every base by every recipe, and make one table of it.

    May be stopped and started again: runs that were submitted are not submitted twice.
    """
    with problems(as_json=as_json):
        chosen = load_manifest(manifest)
        cells = plan(chosen)
        folder = out or manifest.parent / f"{chosen.name}-results"
        with (
            connect(state) as api,
            Ledger(folder / "ledger.jsonl", chosen.name) as ledger,
            Live(console=progress, refresh_per_second=2) as live,
        ):
            lines = run_experiment(
                cells,
                FleetExecutor(api),
                ledger,
                runs_at_once=chosen.runs_at_once,
                show=lambda standing: live.update(_standing(standing)),
            )
        found = table.as_json(chosen.name, lines)
        (folder / "table.csv").write_text(table.as_csv(lines), encoding="utf-8")
        (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        write_plot(chosen.name, lines, folder / "table.svg")
    if as_json:
        print_json(found)
    else:
        results.print(table.as_table(chosen.name, lines))
        results.print(
            f"{found['above_base']} of {found['runs']} adapters score above their base; files in {folder}"
        )
    if found["succeeded"] < found["runs"]:
        raise typer.Exit(1)


def _standing(standing: Standing) -> Table:
    rows = Table(
        title=f"{standing.ended} of {standing.total} runs have ended", title_justify="left", box=None
    )
    for cell, state in standing.running[:_SHOWN_RUNS]:
        step = f"step {state.step}/{state.total_steps}" if state.total_steps else ""
        rows.add_row(cell.key, state.status, step)
    if len(standing.running) > _SHOWN_RUNS:
        rows.add_row(f"and {len(standing.running) - _SHOWN_RUNS} more", "", "")
    return rows
