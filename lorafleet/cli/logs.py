"""`lorafleet logs`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict

from lorafleet.cli.connection import connect_rpc, state_folder
from lorafleet.cli.jobs import local_time
from lorafleet.cli.output import JsonOption, StateOption, plain, print_json, problems, results
from lorafleet.fleet.errors import FleetError
from lorafleet.fleet.logfile import tail
from lorafleet.fleet.services import SERVICES

_JOB_PREFIX = "ftjob-"
_PROCESSES = ("fleet", "valkey", *SERVICES)
_POLL_SECONDS = 0.3


def logs(
    of: Annotated[
        str, typer.Argument(help="A job's id, or a process: " + ", ".join(_PROCESSES) + ".")
    ] = "fleet",
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Lines from the end.")] = 40,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more is written.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the events of a job, or the end of a process's log."""
    with problems(as_json=as_json):
        if of.startswith(_JOB_PREFIX):
            _job(of, state, follow=follow, as_json=as_json)
            return
        if of not in _PROCESSES:
            raise FleetError(f"{of!r} is no job and no process; there are {', '.join(_PROCESSES)}")
        path = state_folder(state).log_file(of)
        if not path.is_file():
            raise FleetError(f"{path} is not there; has the fleet been started?")
        if as_json:
            print_json({"process": of, "path": str(path), "lines": tail(path, lines=lines).splitlines()})
            return
        sys.stdout.write(tail(path, lines=lines).rstrip("\n") + "\n")
        for piece in _written_to(path) if follow else ():
            sys.stdout.write(piece)
            sys.stdout.flush()


def _job(job_id: str, state: Path | None, *, follow: bool, as_json: bool) -> None:
    with connect_rpc(state) as client:
        if as_json:
            found = client.jobs.past_events(job_id)
            print_json({"data": [MessageToDict(event, preserving_proto_field_name=True) for event in found]})
            return
        events = client.jobs.events(job_id) if follow else iter(client.jobs.past_events(job_id))
        for event in events:
            results.print(f"{local_time(event.create_time.seconds)}  {plain(event.message)}")


def _written_to(path: Path) -> Iterator[str]:
    """Yield what is appended to a file from now on; a file that was turned over is read from its start."""
    position = path.stat().st_size
    while True:
        size = path.stat().st_size
        if size != position:
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(position if size > position else 0)
                yield file.read()
                position = file.tell()
        time.sleep(_POLL_SECONDS)
