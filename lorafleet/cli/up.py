"""`lorafleet up` and `lorafleet down`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status

from lorafleet.cli.connection import state_folder
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, program, progress, results
from lorafleet.fleet import launch
from lorafleet.fleet.config import ComputeDtype, Quantization, Wishes
from lorafleet.fleet.launch import Fleet, Readiness


def up(
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base model, in transformers' layout.")
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="Name to serve the base under.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP API.", min=1, max=65535)] = None,
    quantization: Annotated[Quantization | None, typer.Option(help="Storage of the base's weights.")] = None,
    compute_dtype: Annotated[ComputeDtype | None, typer.Option(help="Type that products run in.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach/--foreground", help="Return when ready, or stay until Ctrl-C.")
    ] = True,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait until ready.", min=1)
    ] = launch.READY_SECONDS,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Start the fleet on this machine, and say what to try next.

    Without options it starts as it did the last time.
    """
    wishes = Wishes(
        base_path=base,
        base_name=base_name,
        port=port,
        quantization=quantization,
        compute_dtype=compute_dtype,
    )
    folder = state_folder(state)
    with problems(as_json=as_json):
        if not detach:
            _tell(launch.prepare_foreground(folder, wishes), None, as_json=as_json)
            sys.stdout.flush()
            os.execv(sys.executable, launch.supervisor_command(folder))  # noqa: S606 - our own interpreter
        began = time.monotonic()
        with progress.status("starting") as line:
            fleet = launch.up(folder, wishes, ready_seconds=timeout, watcher=lambda ready: _show(line, ready))
        _tell(fleet, time.monotonic() - began, as_json=as_json)


def down(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Stop the fleet; what it stored stays."""
    folder = state_folder(state)
    with problems(as_json=as_json):
        with progress.status("stopping"):
            was_running = launch.down(folder)
        if as_json:
            print_json({"state": str(folder.root), "was_running": was_running})
        else:
            results.print("stopped" if was_running else "nothing was running")


def _show(line: Status, ready: Readiness) -> None:
    waiting = [name for name, is_there in ready.items() if not is_there]
    line.update(f"waiting for {', '.join(waiting)}" if waiting else "ready")


def _tell(fleet: Fleet, seconds: float | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "base_url": fleet.base_url,
                "api_key": fleet.api_key,
                "base": fleet.config.base_name,
                "state": str(fleet.state.root),
                "supervisor_pid": fleet.supervisor_pid,
                "was_running": fleet.was_running,
                "ready_seconds": seconds,
            }
        )
        return
    if fleet.was_running:
        results.print("[bold green]already running[/]")
    elif seconds is not None:
        results.print(f"[bold green]ready[/] in {seconds:.1f} s")
    print_coordinates(fleet)


def print_coordinates(fleet: Fleet) -> None:
    """Print where the fleet is and what to try next."""
    results.print(f"  URL      {fleet.base_url}")
    results.print(f"  API key  {fleet.api_key}")
    results.print(f"  base     {fleet.config.base_name} ({fleet.config.quantization})")
    results.print(f"  state    {fleet.state.root}")
    results.print("try next:")
    results.print(f'  {program()} run {fleet.config.base_name} "Once upon a time"')
    results.print(f"  {program()} train FILE.jsonl --name NAME")
    results.print(f"  {program()} list | jobs | status | down")
