"""What can go wrong between the command line and the embedded fleet."""

from __future__ import annotations


class FleetError(Exception):
    """A problem that the person at the keyboard can act on; the message says how."""
