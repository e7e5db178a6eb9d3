"""`lorafleet demo`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lorafleet.cli.connection import state_folder
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, program, progress, results
from lorafleet.cli.up import print_coordinates
from lorafleet.client import Client
from lorafleet.demo.demo import Plan, run_demo
from lorafleet.demo.page import write_page
from lorafleet.demo.report import print_report
from lorafleet.fleet import launch
from lorafleet.fleet.config import Wishes
from lorafleet.tasks import Task, TaskError, generated_tasks, load_tasks


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of tasks; six small ones are generated without it.", file_okay=False),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names of tasks in DATA, separated by commas.")] = None,
    epochs: Annotated[int, typer.Option(min=1, max=50)] = 4,
    max_train_rows: Annotated[int, typer.Option(min=1, help="Training rows of a task.")] = 240,
    test_rows: Annotated[int, typer.Option(min=1, help="Rows of a task to evaluate on.")] = 100,
    max_seq_len: Annotated[int, typer.Option(min=8, help="Longer training rows are left out.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 7,
    report: Annotated[
        Path | None,
        typer.Option(
            help="The report with its plots, as HTML; demo.html in the state folder.", dir_okay=False
        ),
    ] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune one adapter for each of some tasks, serve them mixed, and print what came out.

    Starts the fleet if it is not up, and leaves it up.
    """
    with problems(as_json=as_json), tempfile.TemporaryDirectory(prefix="lorafleet-demo-") as work:
        chosen = _tasks(data, tasks, Path(work) / "tasks", max_train_rows, test_rows, seed)
        plan = Plan(epochs=epochs, max_seq_len=max_seq_len, seed=seed, work_folder=Path(work))
        with progress.status("starting the fleet"):
            fleet = launch.up(state_folder(state), Wishes())
        with Client(fleet.config.grpc_target, fleet.api_key) as client:
            evict = client.inference.evict
            found = run_demo(fleet.base_url, fleet.api_key, chosen, plan, evict, progress)
        page = report or fleet.state.root / "demo.html"
        write_page(found, page)
    if as_json:
        print_json(found.as_json())
        return
    print_report(found, results)
    results.print(f"report: {page}")
    results.print("[bold green]the fleet is still up[/]")
    print_coordinates(fleet)
    first = chosen[0]
    results.print(f"  {program()} run {first.adapter} {_quoted(first.test[0].prompt.rstrip())}")


def _tasks(
    data: Path | None, names: str | None, folder: Path, max_train_rows: int, test_rows: int, seed: int
) -> list[Task]:
    if data is None:
        if names is not None:
            raise TaskError("--tasks names tasks in a folder: give that with --data")
        return generated_tasks(folder, max_train_rows=max_train_rows, test_rows=test_rows, seed=seed)
    if names is None:
        raise TaskError("--data needs --tasks: the names of the tasks, separated by commas")
    return load_tasks(data, names.split(","), max_train_rows=max_train_rows, test_rows=test_rows)


def _quoted(text: str) -> str:
    """Return text as one word of a shell."""
    return "$'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
