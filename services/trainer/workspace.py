"""What a full disk under a job's working files looks like, and the error that callers are told."""

from __future__ import annotations

import errno
import re

from safetensors import SafetensorError

from services.common.errors import ResourceExhausted

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# The library tells the operating system's error in its text alone.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def storage_full(error: Exception) -> ResourceExhausted | None:
    """Return the error to tell where `error` means that a disk has no room left, None for any other."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (match := _OS_ERROR.search(str(error))):
        number = int(match[1])
    if number not in _FULL:
        return None
    return ResourceExhausted(
        "storage_full",
        "there is no room left for the job's working files; make room and resume the job, which goes on from"
        " its last checkpoint",
        resource="work folder",
        final=True,
    )
