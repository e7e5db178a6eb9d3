"""TCP ports on the loopback interface."""

from __future__ import annotations

import socket
from collections.abc import Collection

from lorafleet.fleet.errors import FleetError

HOST = "127.0.0.1"
_LAST_PORT = 65535


def is_free(port: int) -> bool:
    """Return whether a server could listen on `port` now."""
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def next_free(port: int, *, taken: Collection[int] = ()) -> int:
    """Return the first free port from `port` upwards that is not in `taken`.

    Raises:
        FleetError: every port up to 65535 is in use.
    """
    for candidate in range(port, _LAST_PORT + 1):
        if candidate not in taken and is_free(candidate):
            return candidate
    raise FleetError(f"no free port from {port} upwards")
