"""`lorafleet list`."""

from __future__ import annotations

from rich.table import Table

from lorafleet.api import Json
from lorafleet.cli.connection import connect
from lorafleet.cli.jobs import local_time
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, results


def list_adapters(state: StateOption = None, as_json: JsonOption = False) -> None:
    """List the base and the adapters, with their newest versions and aliases."""
    with problems(as_json=as_json), connect(state) as api:
        base, adapters = api.base_name(), api.adapters()
    if as_json:
        print_json({"base": base, "adapters": adapters})
        return
    table = Table("name", "newest", "versions", "aliases", "rank", "published", box=None)
    table.add_row(base, "base", "", "", "", "")
    for adapter in adapters:
        table.add_row(*_cells(adapter))
    results.print(table)


def _cells(adapter: Json) -> tuple[str, ...]:
    newest = adapter["latest_version"]
    aliases = ", ".join(f"@{alias['name']} → :{alias['version']}" for alias in adapter["aliases"])
    if newest is None:
        return adapter["name"], "deleted", str(adapter["num_versions"]), aliases, "", ""
    return (
        adapter["name"],
        f":{newest['version']}",
        str(adapter["num_versions"]),
        aliases,
        str(newest["format"]["max_rank"]),
        local_time(newest["create_time"]),
    )
