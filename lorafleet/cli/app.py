"""The `lorafleet` command and its verbs."""

from __future__ import annotations

import typer

from lorafleet.cli.bakeoff import bakeoff
from lorafleet.cli.demo import demo
from lorafleet.cli.jobs import jobs
from lorafleet.cli.listing import list_adapters
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
app.command()(up)
app.command()(down)
app.command()(status)
app.command()(train)
app.command()(jobs)
app.command("list")(list_adapters)
app.command()(run)
app.command()(demo)
app.command()(bakeoff)


def main() -> None:
    """Run the command line; exits 0 on success, 1 on a problem, 2 on wrong usage."""
    app()
