"""How commands speak: results on standard output, progress on standard error, JSON when asked for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lorafleet.api import ApiError
from lorafleet.experiment.ledger import LedgerError
from lorafleet.experiment.manifest import ManifestError
from lorafleet.experiment.plot import PlotError
from lorafleet.fleet.errors import FleetError
from lorafleet.tasks import TaskError
from services.common.errors import LorafleetError

StateOption = Annotated[
    Path | None,
    typer.Option("--state", help="State folder; $LORAFLEET_STATE, else ~/.lorafleet.", file_okay=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

# Where nobody looks, as in a file, tables need not fit a screen.
_FILE_WIDTH = 120
results = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
progress = Console(stderr=True, soft_wrap=True, highlight=False)

# What a user can act on, and the word for it where the problem has none of its own.
_CODES: dict[type[Exception], str] = {
    ApiError: "api",
    FleetError: "fleet",
    LedgerError: "ledger",
    ManifestError: "manifest",
    PlotError: "plot",
    TaskError: "task",
}
_KNOWN: tuple[type[Exception], ...] = (*_CODES, LorafleetError)


def program() -> str:
    """Return how to call this program from the shell that called it."""
    return "lorafleet" if shutil.which("lorafleet") else sys.argv[0]


def print_json(value: Mapping[str, Any]) -> None:
    """Print the one JSON object that a command with `--json` prints."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def problems(*, as_json: bool) -> Iterator[None]:
    """Turn a problem that the user can act on into a message and exit code 1."""
    try:
        yield
    except _KNOWN as error:
        code = _code(error)
        if as_json:
            print_json({"error": {"code": code, "message": str(error)}})
        else:
            progress.print(f"[red]error:[/red] {plain(str(error))}")
        raise typer.Exit(1) from error


def _code(error: Exception) -> str:
    """Return the stable word for a problem."""
    if isinstance(error, ApiError):
        return error.code
    if isinstance(error, LorafleetError):
        return error.reason
    return _CODES[type(error)]


def plain(text: str) -> str:
    """Return text that rich prints as it is."""
    return text.replace("[", r"\[")
