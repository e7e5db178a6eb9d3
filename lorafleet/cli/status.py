"""`lorafleet status`."""

from __future__ import annotations

import time
from typing import Any

import psutil
import typer
from rich.table import Table

from lorafleet.cli.connection import state_folder
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, results
from lorafleet.fleet import launch, lock
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.state import StateFolder
from lorafleet.fleet.status import FleetStatus, ProcessStatus

_MIB = 1024 * 1024


def status(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show the processes of the fleet; exits with 1 unless all of them are ready."""
    folder = state_folder(state)
    with problems(as_json=as_json):
        config = FleetConfig.load(folder)
        is_running = config is not None and lock.holder(folder.lock_file) is not None
        processes = _processes(folder, config) if is_running and config else []
    if as_json:
        print_json(
            {
                "running": is_running,
                "state": str(folder.root),
                "base_url": f"{config.url}/v1" if config else None,
                "base": config.base_name if config else None,
                "processes": processes,
            }
        )
    elif not is_running or config is None:
        results.print(f"not running ({folder.root})")
    else:
        results.print(f"{config.url}/v1  base {config.base_name} ({config.quantization})  {folder.root}")
        results.print(_table(processes))
    if not is_running or not all(process["ready"] for process in processes):
        raise typer.Exit(1)


def _processes(folder: StateFolder, config: FleetConfig) -> list[dict[str, Any]]:
    recorded = FleetStatus.load(folder)
    ready = launch.readiness(config)
    return [_facts(folder, process, ready) for process in (recorded.processes if recorded else ())]


def _facts(folder: StateFolder, process: ProcessStatus, ready: launch.Readiness) -> dict[str, Any]:
    return {
        "name": process.name,
        "state": process.state,
        "ready": ready.get(process.name, process.state == "running"),
        "pid": process.pid,
        "up_seconds": round(time.time() - process.started_at, 1) if process.started_at else None,
        "memory_bytes": _memory_bytes(process.pid) if process.pid else None,
        "restarts": process.restarts,
        "last_ending": process.last_ending,
        "log": str(folder.log_file(process.name)),
    }


def _memory_bytes(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None


def _table(processes: list[dict[str, Any]]) -> Table:
    table = Table("process", "state", "ready", "pid", "up", "memory", "restarts", "last ending", box=None)
    for process in processes:
        up_seconds, memory_bytes = process["up_seconds"], process["memory_bytes"]
        table.add_row(
            process["name"],
            process["state"],
            "[green]yes[/]" if process["ready"] else "[red]no[/]",
            str(process["pid"] or ""),
            f"{up_seconds:.0f} s" if up_seconds is not None else "",
            f"{memory_bytes / _MIB:.0f} MiB" if memory_bytes is not None else "",
            str(process["restarts"]),
            process["last_ending"] or "",
        )
    return table
