"""`lorafleet keys`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from lorafleet.cli.connection import connect
from lorafleet.cli.jobs import local_time
from lorafleet.cli.output import JsonOption, StateOption, print_json, problems, progress, results

keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "",
    scopes: Annotated[
        str, typer.Option(help="What it may do, separated by commas; all that this key may do without.")
    ] = "",
    days: Annotated[int | None, typer.Option(min=1, help="Days until it expires; never without.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whom it belongs to; this key's tenant without.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, once."""
    wanted = {
        "name": name,
        "scopes": [scope.strip() for scope in scopes.split(",")] if scopes else None,
        "expires_in_days": days,
        "tenant": tenant,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    with problems(as_json=as_json), connect(state) as api:
        made = api.create_key({field: value for field, value in wanted.items() if value is not None})
    if as_json:
        print_json(made)
        return
    results.print(made["key"], soft_wrap=True)
    progress.print("it is shown this once; keep it somewhere safe")


@keys.command("list")
def list_keys(state: StateOption = None, as_json: JsonOption = False) -> None:
    """List the keys that were not revoked."""
    with problems(as_json=as_json), connect(state) as api:
        found = api.keys()
    if as_json:
        print_json({"object": "list", "data": found})
        return
    table = Table("id", "name", "scopes", "made", "expires", box=None)
    for key in found:
        table.add_row(
            key["id"],
            key["name"],
            ", ".join(key["scopes"]),
            local_time(key["created_at"]),
            local_time(key["expires_at"]) if key["expires_at"] else "never",
        )
    results.print(table)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, the part between its first two hyphens.")],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key useless."""
    with problems(as_json=as_json), connect(state) as api:
        answer = api.revoke_key(key_id)
    if as_json:
        print_json(answer)
    else:
        results.print(f"revoked {key_id}")
