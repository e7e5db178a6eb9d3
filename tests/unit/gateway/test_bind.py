"""The listening socket."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.common.errors import FailedPrecondition
from services.gateway.config import GatewaySettings
from services.gateway.server import bind

EVERYWHERE = "0.0.0.0:0"


def settings(listen: str, *, insecure_bind: bool = False) -> GatewaySettings:
    return GatewaySettings(
        listen=listen,
        insecure_bind=insecure_bind,
        store_url="file:///nowhere",
        key_pepper=SecretStr("a pepper for tests"),
    )


def test_answers_never_wait_for_acknowledgements() -> None:
    with (
        bind(settings("127.0.0.1:0")) as listener,
        socket.create_connection(listener.getsockname()),
        contextlib.closing(listener.accept()[0]) as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_only_loopback_unless_told_otherwise() -> None:
    with pytest.raises(FailedPrecondition, match="insecure_bind"):
        bind(settings(EVERYWHERE))
    with bind(settings(EVERYWHERE, insecure_bind=True)) as listener:
        assert listener.getsockname()[1] > 0
    over_tls = settings(EVERYWHERE).model_copy(
        update={"tls_cert_file": Path("/c"), "tls_key_file": Path("/k")}
    )
    with bind(over_tls) as listener:
        assert listener.getsockname()[1] > 0


def test_a_socket_that_was_handed_over_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as kept:
        address = f"127.0.0.1:{kept.getsockname()[1]}"
        handed_over = settings(address).model_copy(update={"listen_fd": os.dup(kept.fileno())})
        with (
            bind(handed_over) as listener,
            socket.create_connection(kept.getsockname()),
            contextlib.closing(listener.accept()[0]) as accepted,
        ):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        # Whoever keeps it goes on listening.
        socket.create_connection(kept.getsockname()).close()


def test_what_does_not_listen_there_is_refused() -> None:
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as other:
        for stranger in (closed, other):
            handed_over = settings("127.0.0.1:1").model_copy(update={"listen_fd": stranger.fileno()})
            with pytest.raises(OSError, match="no socket that listens"):
                bind(handed_over)
