"""`lorafleet train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lorafleet.api import Json
from lorafleet.cli.connection import connect
from lorafleet.cli.output import (
    JsonOption,
    StateOption,
    plain,
    print_json,
    problems,
    program,
    progress,
    results,
)
from lorafleet.following import follow


def train(
    file: Annotated[
        Path, typer.Argument(help="Examples, one JSON object per line.", exists=True, dir_okay=False)
    ],
    name: Annotated[str, typer.Option(help="The adapter that the result becomes a version of.")],
    epochs: Annotated[int | None, typer.Option(min=1, max=50)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=256, help="Examples per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0)] = None,
    rank: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    max_seq_len: Annotated[int | None, typer.Option(min=8, help="Longest example in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1)] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job to its end.")] = True,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune an adapter on FILE and follow the job; Ctrl-C leaves the job running."""
    hyperparameters = {"n_epochs": epochs, "batch_size": batch_size}
    options = {"learning_rate": learning_rate, "rank": rank, "max_seq_len": max_seq_len}
    with problems(as_json=as_json), connect(state) as api:
        body: Json = {
            "model": api.base_name(),
            "training_file": api.upload(file),
            "suffix": name,
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": _given(hyperparameters), "lorafleet": _given(options)},
            },
        }
        job = api.create_job(body if seed is None else {**body, "seed": seed})
        if wait:
            job = follow(api, [job["id"]], progress)[0]
    if as_json:
        print_json(job)
    else:
        _tell(job)
    if job["status"] == "failed":
        raise typer.Exit(1)


def _given(values: Mapping[str, int | float | None]) -> dict[str, int | float]:
    return {name: value for name, value in values.items() if value is not None}


def _tell(job: Json) -> None:
    if job["error"]:
        progress.print(f"[red]failed:[/red] {plain(job['error']['message'])}")
        return
    if job["status"] != "succeeded":
        results.print(f"{job['id']}  {job['status']}")
        return
    results.print(f"[bold green]published[/] {job['fine_tuned_model']}")
    if job["lorafleet"]["evaluation"]:
        results.print(_evaluation(job["lorafleet"]["evaluation"]))
    results.print(f'try it: {program()} run {job["lorafleet"]["adapter"]} "..."')


def _evaluation(metrics: list[Json]) -> Table:
    table = Table("held-out rows", "base", "adapter", "rows", box=None)
    for metric in metrics:
        table.add_row(
            metric["name"],
            f"{metric['base_value']:.3f}",
            f"{metric['adapter_value']:.3f}",
            str(metric["rows"]),
        )
    return table
