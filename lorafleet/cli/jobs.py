"""`lorafleet jobs`."""

from __future__ import annotations

from datetime import datetime

from rich.table import Table

from lorafleet.cli.connection import connect
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, results


def jobs(state: StateOption = None, as_json: JsonOption = False) -> None:
    """List the fine-tuning jobs, newest first."""
    with problems(as_json=as_json), connect(state) as api:
        found = api.jobs()
    if as_json:
        print_json({"object": "list", "data": found})
        return
    table = Table("job", "status", "adapter", "created", "model", box=None)
    for job in found:
        table.add_row(
            job["id"],
            job["status"],
            job["lorafleet"]["adapter"],
            local_time(job["created_at"]),
            job["fine_tuned_model"] or "",
        )
    results.print(table)


def local_time(unix_seconds: int) -> str:
    """Return a time for people, in the time zone of this machine."""
    return datetime.fromtimestamp(unix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
