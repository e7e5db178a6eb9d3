"""`lorafleet push`, `pull`, `show`, `alias`, `rollback` and `rm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.table import Table

from lorafleet.cli.connection import connect_rpc
from lorafleet.cli.jobs import local_time
from lorafleet.cli.output import JsonOption, StateOption, plain, print_json, problems, program, results
from lorafleet.registry.v1 import adapter_pb2

_MIB = 1024 * 1024

Ref = Annotated[str, typer.Argument(help="An adapter: name, name:3, name@alias or name@sha256:...")]
Name = Annotated[str, typer.Argument(help="An adapter's name.")]
Alias = Annotated[str, typer.Argument(help="An alias, such as prod.")]


def push(
    folder: Annotated[Path, typer.Argument(help="A PEFT adapter's folder.", exists=True, file_okay=False)],
    name: Annotated[str, typer.Option(help="The adapter that it becomes a version of.")],
    base: Annotated[str, typer.Option(help="The base it was trained on; the one that is served.")] = "",
    description: Annotated[str, typer.Option(help="For its card.")] = "",
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish the adapter in FOLDER as the next version of an adapter."""
    with problems(as_json=as_json), connect_rpc(state) as client:
        version = client.adapters.push(name, folder, base=base, description=description)
    if as_json:
        print_json(_as_json(version))
        return
    results.print(f"[bold green]published[/] {version.adapter}:{version.version}  {version.digest}")
    for warning in version.warnings:
        results.print(f"[yellow]warning:[/] {plain(warning)}")
    results.print(f'try it: {program()} run {version.adapter}:{version.version} "..."')


def pull(
    ref: Ref,
    folder: Annotated[Path, typer.Argument(help="Where to; made if absent.", file_okay=False)],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the two files of REF to FOLDER, as plain PEFT reads them."""
    with problems(as_json=as_json), connect_rpc(state) as client:
        version = client.adapters.pull(ref, folder)
    if as_json:
        print_json(_as_json(version))
    else:
        results.print(f"{version.adapter}:{version.version} is in {folder}")


def show(ref: Ref, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show a version: what it is, how it was trained, and what was measured."""
    with problems(as_json=as_json), connect_rpc(state) as client:
        version = client.adapters.resolve(ref)
    if as_json:
        print_json(_as_json(version))
        return
    results.print(_facts(version))
    if version.card.metrics:
        results.print(_metrics(version))


def alias(
    name: Name,
    alias: Alias,
    version: Annotated[int, typer.Argument(min=1, help="The version that it shall point to.")],
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias of an adapter to a version."""
    with problems(as_json=as_json), connect_rpc(state) as client:
        moved = client.adapters.set_alias(name, alias, version)
    _tell_alias(moved, as_json=as_json)


def rollback(name: Name, alias: Alias, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Point an alias back to where it pointed before its last move."""
    with problems(as_json=as_json), connect_rpc(state) as client:
        moved = client.adapters.rollback(name, alias)
    _tell_alias(moved, as_json=as_json)


def rm(
    ref: Annotated[str, typer.Argument(help="name for an adapter with all versions, name:3 for one.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a whole adapter goes.")] = False,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a version, or an adapter with all of them; requests that run finish first."""
    name, _, number = ref.partition(":")
    if number and not number.isdigit():
        raise typer.BadParameter(f"{number!r} is no version number", param_hint="REF")
    if not number and not yes:
        typer.confirm(f"Delete {name} with all its versions and aliases?", abort=True, err=True)
    with problems(as_json=as_json), connect_rpc(state) as client:
        client.adapters.delete(name, int(number) if number else None)
    if as_json:
        print_json({"deleted": ref})
    else:
        results.print(f"deleted {ref}")


def _tell_alias(moved: adapter_pb2.Alias, *, as_json: bool) -> None:
    if as_json:
        print_json(_as_json(moved))
    else:
        results.print(f"{moved.adapter}@{moved.name} → :{moved.version}  (move {moved.generation})")


def _facts(version: adapter_pb2.AdapterVersion) -> Table:
    table = Table(box=None, show_header=False)
    form, card = version.format, version.card
    trained_on = f"{card.training_rows:,} rows, {card.trained_tokens:,} tokens" if card.training_rows else ""
    settings = (f"{name}={value}" for name, value in sorted(card.hyperparameters.items()) if value)
    rows = {
        "version": f"{version.adapter}:{version.version}",
        "digest": version.digest,
        "aliases": ", ".join(f"@{name}" for name in version.aliases),
        "published": local_time(version.create_time.seconds),
        "base": f"{version.base_model}  ({version.base_fingerprint_digest})",
        "weights": f"{form.weights_bytes / _MIB:.2f} MiB, {form.num_parameters:,} parameters, {form.dtype}",
        "shape": f"rank up to {form.max_rank} on {', '.join(form.target_modules)}",
        "method": card.method,
        "job": card.job_id,
        "trained on": trained_on,
        "settings": ", ".join(settings),
        "description": card.description,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, plain(value))
    return table


def _metrics(version: adapter_pb2.AdapterVersion) -> Table:
    table = Table("metric", "of", "value", "95 % interval", "rows", box=None)
    for metric in version.card.metrics:
        interval = f"{metric.ci_low:.3f} to {metric.ci_high:.3f}" if metric.HasField("ci_low") else ""
        table.add_row(metric.name, metric.subject, f"{metric.value:.4g}", interval, str(metric.rows))
    return table


def _as_json(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)
