"""The command reference: every word of `lorafleet`, with its arguments and options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer.main

from docs.tooling.markdown import table
from lorafleet.cli.app import app


def cli_page() -> str:
    """Return the Markdown of the page."""
    program: Any = typer.main.get_command(app)
    context = typer.Context(program, info_name="lorafleet")
    lines = ["# Commands", "", "`lorafleet COMMAND --help` says the same.", ""]
    return "\n".join([*lines, *_commands(program, context)])


def _commands(group: Any, context: Any) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(command, info_name=name, parent=context)
        if hasattr(command, "list_commands"):
            yield from _commands(command, inner)
        else:
            yield from _command(command, inner)


def _command(command: Any, context: Any) -> Iterator[str]:
    path = context.command_path
    yield from (f"## {path}", "", inspect.cleandoc(command.help or ""), "")
    yield f"```\n{' '.join([path, *command.collect_usage_pieces(context)])}\n```\n"
    rows = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if rows:
        yield from table(("", ""), rows)
