"""Errors of the operating system on a disk, as errors that callers understand."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from services.common.errors import ResourceExhausted, Unavailable

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Translate what the disk of `what` ("object store") answers.

    Raises:
        ResourceExhausted: `storage_full`, where there is no room left, of bytes or of files.
        Unavailable: `store_unavailable`, for everything else that the disk refuses.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceExhausted("storage_full", f"The {what} has no room left.", resource=what) from error
        message = f"The {what} cannot be used: {error.strerror or type(error).__name__}."
        raise Unavailable("store_unavailable", message, resource=what) from error
