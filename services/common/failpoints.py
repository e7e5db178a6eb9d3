"""Named places where a test ends the process, to show what a crash exactly there leaves behind.

`LORAFLEET_FAILPOINT="publish.before_record=kill"` ends the process by SIGKILL the first time it comes to that
place; `publish.before_record=kill:3` lets it pass twice first. Unset, as it always is outside of tests, a
place costs one comparison.
"""

from __future__ import annotations

import os
import re
import signal

from services.common.errors import InvalidArgument

VARIABLE = "LORAFLEET_FAILPOINT"
_RULE = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)=kill(?::([1-9][0-9]{0,5}))?")


class _Killer:
    """Counts the visits of one place and ends the process at the last one."""

    def __init__(self, name: str, visits: int) -> None:
        self._name = name
        self._visits_left = visits

    def visit(self, name: str) -> None:
        if name != self._name:
            return
        self._visits_left -= 1
        if self._visits_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


_armed: _Killer | None = None


def failpoint(name: str) -> None:
    """Mark a place; end the process here where the rule in force says so."""
    if _armed is not None:
        _armed.visit(name)


def arm(rule: str) -> None:
    """Put `rule` in force, "" for none. Raises `InvalidArgument` (`bad_failpoint`)."""
    global _armed
    parsed = _RULE.fullmatch(rule)
    if rule and parsed is None:
        message = f"{VARIABLE} must be NAME=kill or NAME=kill:COUNT."
        raise InvalidArgument("bad_failpoint", message, field=VARIABLE, value=rule)
    _armed = _Killer(parsed[1], int(parsed[2] or 1)) if parsed else None


arm(os.environ.get(VARIABLE, ""))
