"""The command line: `lorafleet`."""

from lorafleet.cli.app import main

__all__ = ["main"]
