"""TLS and mutual TLS from PEM files, checked when a process starts.

gRPC speaks TLS 1.2 and 1.3 and nothing older. It reports a bad certificate only when a peer connects, so the
files are loaded here once more, by the standard library, where a mistake can still be named and refused.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from services.common.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class ServerTls:
    """Who a server is, and whose clients it takes.

    Attributes:
        cert_file: certificate chain, PEM, the server's own certificate first.
        key_file: its private key, PEM, not encrypted.
        client_ca_file: authorities whose certificates clients must show (mutual TLS); None takes any client.
    """

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials.

        Raises:
            FailedPrecondition: `tls_file_unreadable`, `tls_bad_pair` or `tls_bad_authority`.
        """
        self.check()
        authorities = None if self.client_ca_file is None else _read(self.client_ca_file)
        pair = (_read(self.key_file), _read(self.cert_file))
        return grpc.ssl_server_credentials([pair], authorities, authorities is not None)

    def check(self) -> None:
        """Raise as `credentials` does where the files cannot be used."""
        _check_pair(self.cert_file, self.key_file)
        if self.client_ca_file is not None:
            _check_authorities(self.client_ca_file)


@dataclass(frozen=True, slots=True)
class PeerTls:
    """Whose servers a channel trusts, and who it says it is.

    Attributes:
        ca_file: authorities, PEM; a server's certificate must come from one and bear the target's name.
        cert_file: certificate chain to show where a server asks for one.
        key_file: its private key, PEM, not encrypted.
    """

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials.

        Raises:
            FailedPrecondition: `tls_file_unreadable`, `tls_bad_pair` or `tls_bad_authority`.
        """
        _check_authorities(self.ca_file)
        authorities = _read(self.ca_file)
        if self.cert_file is None or self.key_file is None:
            return grpc.ssl_channel_credentials(authorities)
        _check_pair(self.cert_file, self.key_file)
        return grpc.ssl_channel_credentials(authorities, _read(self.key_file), _read(self.cert_file))


def _check_pair(cert_file: Path, key_file: Path) -> None:
    _read(cert_file)
    _read(key_file)
    try:
        # Without the empty password an encrypted key would be asked for on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except ssl.SSLError as error:
        raise FailedPrecondition(
            "tls_bad_pair",
            f"{cert_file} and {key_file} are no certificate with its unencrypted private key "
            f"({_cause(error)})",
            value=str(cert_file),
        ) from error


def _check_authorities(path: Path) -> None:
    _read(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise FailedPrecondition(
            "tls_bad_authority", f"{path} holds no certificates ({_cause(error)})", value=str(path)
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            "tls_file_unreadable", f"{path} cannot be read ({error.strerror})", value=str(path)
        ) from error


def _cause(error: ssl.SSLError) -> str:
    """Return OpenSSL's word for what happened, e.g. `KEY_VALUES_MISMATCH`."""
    return error.reason or str(error)
