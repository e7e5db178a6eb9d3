"""The bond of a child process to the service that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from services.trainer.child import PARENT_VARIABLE

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; end at once if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):
        sys.exit(1)
