"""The life of the gateway process: bind, listen, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from services.common import logs
from services.common.config import Address
from services.common.errors import FailedPrecondition, LorafleetError
from services.common.server import publish_address, start_telemetry
from services.common.store import open_store
from services.gateway.app import create_app
from services.gateway.config import GatewaySettings
from services.gateway.wire import HEAD_LIMIT_BYTES, protocol_class

_logger = logging.getLogger("lorafleet.gateway")

EXIT_OK = 0
EXIT_FAILED = 1
_BACKLOG = 2048
# Longer than clients and proxies keep an idle connection (httpx: 5 s, most proxies: 60 s), so that they close
# it and not we: a request that is on its way when the server closes its connection fails.
KEEP_ALIVE_SECONDS = 75


class GatewayServer(uvicorn.Server):
    """uvicorn with the signals and the start-up message of our other services."""

    def __init__(self, config: uvicorn.Config, settings: GatewaySettings, address: Address) -> None:
        super().__init__(config)
        self._settings = settings
        self._address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then tell whoever waits where."""
        await super().startup(sockets)
        _logger.info("listening", extra={"address": str(self._address)})
        await asyncio.to_thread(publish_address, self._settings, self._address)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Drain at SIGTERM or SIGINT and end with exit status 0, instead of dying by the signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain, number)
        yield

    def _drain(self, number: signal.Signals) -> None:
        _logger.info("draining", extra={"signal": number.name, "grace_seconds": self._settings.grace_seconds})
        self.should_exit = True


async def serve(settings: GatewaySettings) -> int:
    """Run the gateway until SIGTERM or SIGINT and return the exit code."""
    logs.configure("gateway", settings.log_level)
    try:
        telemetry = start_telemetry("gateway", settings)
        tls = settings.server_tls
        if tls is not None:
            tls.check()
        listener = bind(settings)
        app = create_app(settings, open_store(settings.store_url, **store_credentials(settings)))
    except (LorafleetError, OSError) as error:
        _logger.error("cannot start", extra={"detail": str(error)})
        return EXIT_FAILED
    config = http_config(app, settings)
    with contextlib.closing(listener):
        server = GatewayServer(config, settings, Address(*listener.getsockname()[:2]))
        await server.serve(sockets=[listener])
    await asyncio.to_thread(telemetry.shutdown)
    _logger.info("stopped")
    return EXIT_OK


def http_config(app: FastAPI, settings: GatewaySettings) -> uvicorn.Config:
    """Return how uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http=protocol_class(settings),
        h11_max_incomplete_event_size=HEAD_LIMIT_BYTES,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.grace_seconds),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_certfile=settings.tls_cert_file,
        ssl_keyfile=settings.tls_key_file,
        ssl_ca_certs=settings.tls_client_ca_file and str(settings.tls_client_ca_file),
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca_file else ssl.CERT_NONE,
    )


def bind(settings: GatewaySettings) -> socket.socket:
    """Return a socket that listens where the settings say.

    Raises:
        FailedPrecondition: `insecure_bind`; other machines could read the API keys on their way.
        OSError: the address cannot be bound, or the socket handed over is none that listens there.
    """
    address = settings.address
    if not address.is_loopback and not settings.insecure_bind and settings.server_tls is None:
        raise FailedPrecondition(
            "insecure_bind",
            f"{address} can be reached from other machines, and keys travel in plain text; listen on "
            "loopback behind a TLS proxy, set LORAFLEET_GATEWAY_TLS_CERT_FILE and ..._TLS_KEY_FILE, or set "
            "LORAFLEET_GATEWAY_INSECURE_BIND=true in a closed network",
            field="listen",
            value=str(address),
        )
    if settings.listen_fd is not None:
        listener = _handed_over(settings.listen_fd, address)
    else:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    # Connections inherit it. Without it each answer in two packets waits for the client's delayed
    # acknowledgement, some 40 ms; asyncio sets it only on sockets that it has made itself.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _handed_over(file_descriptor: int, address: Address) -> socket.socket:
    """Return the socket that whoever started this process has bound to `address`."""
    listener = socket.socket(fileno=file_descriptor)
    is_listening = bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    bound = Address(*listener.getsockname()[:2])
    if not is_listening or bound != address:
        listener.detach()
        raise OSError(f"file descriptor {file_descriptor} is no socket that listens on {address}")
    return listener


def store_credentials(settings: GatewaySettings) -> dict[str, str | None]:
    """Return the store's access and secret key for `open_store`."""
    access, secret = settings.store_access_key, settings.store_secret_key
    return {
        "access_key": access.get_secret_value() if access else None,
        "secret_key": secret.get_secret_value() if secret else None,
    }
