"""The `lorafleet` command and its verbs."""

from __future__ import annotations

from collections.abc import Callable

import typer

from lorafleet.cli.adapters import alias, pull, push, rm, rollback, show
from lorafleet.cli.bakeoff import bakeoff
from lorafleet.cli.bench import bench
from lorafleet.cli.compare import compare
from lorafleet.cli.demo import demo
from lorafleet.cli.jobs import jobs
from lorafleet.cli.keys import keys
from lorafleet.cli.listing import list_adapters
from lorafleet.cli.logs import logs
from lorafleet.cli.resident import ps
from lorafleet.cli.run import run
from lorafleet.cli.status import status
from lorafleet.cli.train import train
from lorafleet.cli.up import down, up

app = typer.Typer(
    name="lorafleet",
    help="Fine-tune many LoRA adapters on one 4-bit base model, and serve all of them mixed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# In the order of a first day.
_COMMANDS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("up", up),
    ("down", down),
    ("status", status),
    ("train", train),
    ("jobs", jobs),
    ("logs", logs),
    ("run", run),
    ("compare", compare),
    ("list", list_adapters),
    ("show", show),
    ("ps", ps),
    ("push", push),
    ("pull", pull),
    ("alias", alias),
    ("rollback", rollback),
    ("rm", rm),
    ("bench", bench),
    ("demo", demo),
    ("bakeoff", bakeoff),
)
for name, command in _COMMANDS:
    app.command(name)(command)
app.add_typer(keys, name="keys")


def main() -> None:
    """Run the command line; exits 0 on success, 1 on a problem, 2 on wrong usage."""
    app()
