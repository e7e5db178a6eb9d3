"""Named places where a test ends the process, to show what a crash exactly there leaves behind.

`LORAFLEET_FAILPOINT="publish.before_record=kill"` ends the process by SIGKILL the first time it comes to that
place; `publish.before_record=kill:3` lets it pass twice first. Unset, as it always is outside of tests,
`failpoint` is an empty function.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping

from services.common.errors import InvalidArgument

VARIABLE = "LORAFLEET_FAILPOINT"
_RULE = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)=kill(?::([1-9][0-9]{0,5}))?")


def failpoint_from(environment: Mapping[str, str]) -> Callable[[str], None]:
    """Return the function that the places call, each with its name.

    Raises:
        InvalidArgument: `bad_failpoint`.
    """
    rule = environment.get(VARIABLE, "")
    if not rule:
        return _pass
    parsed = _RULE.fullmatch(rule)
    if parsed is None:
        message = f"{VARIABLE} must be NAME=kill or NAME=kill:COUNT."
        raise InvalidArgument("bad_failpoint", message, field=VARIABLE, value=rule)
    return _Killer(parsed[1], int(parsed[2] or 1))


class _Killer:
    """Counts the visits of one place and ends the process at the last one."""

    def __init__(self, name: str, visits: int) -> None:
        self._name = name
        self._visits_left = visits

    def __call__(self, name: str) -> None:
        if name != self._name:
            return
        self._visits_left -= 1
        if self._visits_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _pass(name: str) -> None:
    """Do nothing."""


failpoint = failpoint_from(os.environ)
