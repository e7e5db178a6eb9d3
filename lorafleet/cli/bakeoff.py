"""`lorafleet bakeoff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from lorafleet.cli.connection import coordinates
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, progress, results
from lorafleet.experiment import table
from lorafleet.experiment.bakeoff import Watcher, run_bakeoff
from lorafleet.experiment.experiment import Standing
from lorafleet.experiment.manifest import load_manifest
from lorafleet.experiment.plan import plan
from lorafleet.experiment.serving import ServingStanding

_SHOWN_RUNS = 12


def bakeoff(
    manifest: Annotated[
        Path, typer.Argument(help="Bases, tasks and recipes, as YAML.", exists=True, dir_okay=False)
    ],
    data: Annotated[
        Path | None, typer.Option(help="Folder of tasks, in place of the manifest's.", file_okay=False)
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="Run only what the manifest has on this base; may be given again."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the ledger and the table; NAME-results beside the manifest.", file_okay=False
        ),
    ] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune every task on every base by every recipe, serve all adapters together, and score them.

    May be stopped and started again: runs that were submitted are not submitted twice, and answers that came
    are not asked for twice.
    """
    with problems(as_json=as_json):
        chosen = load_manifest(manifest, data=data)
        cells = plan(chosen, base or ())
        folder = out or manifest.parent / f"{chosen.name}-results"
        with Live(console=progress, refresh_per_second=2) as live:
            watcher = Watcher(
                training=lambda standing: live.update(_training(standing)),
                serving=lambda standing: live.update(_serving(standing)),
            )
            found = run_bakeoff(*coordinates(state), chosen, cells, folder, watcher)
    if as_json:
        print_json(found.json)
    else:
        results.print(table.as_table(chosen.name, found.lines))
        for name, sums in found.json["bases"].items():
            wins = sums["against_base"]
            results.print(
                f"{name}: {wins['strict_wins']} of {sums['runs']} adapters score above the base, "
                f"{wins['ties']} as high; {wins['surely_above']} surely (95 % interval)"
            )
        results.print(f"files in {folder}")
    if found.json["failed"]:
        raise typer.Exit(1)


def _training(standing: Standing) -> Table:
    rows = Table(
        title=f"{standing.ended} of {standing.total} runs have ended", title_justify="left", box=None
    )
    for cell, state in standing.running[:_SHOWN_RUNS]:
        step = f"step {state.step}/{state.total_steps}" if state.total_steps else ""
        rows.add_row(cell.key, state.status, step)
    if len(standing.running) > _SHOWN_RUNS:
        rows.add_row(f"and {len(standing.running) - _SHOWN_RUNS} more", "", "")
    return rows


def _serving(standing: ServingStanding) -> Table:
    rows = Table(title="test rows, all models together", title_justify="left", box=None)
    rows.add_row("answers", f"{standing.done} of {standing.total}")
    rows.add_row("models", str(standing.models))
    rows.add_row("tokens a second", f"{standing.tokens / max(standing.seconds, 1e-9):.0f}")
    return rows
