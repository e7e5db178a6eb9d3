"""TLS and mutual TLS on real servers: who may talk to whom, and what is said where they may not."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common.channels import open_channel
from services.common.config import ServiceSettings
from services.common.errors import FailedPrecondition
from services.common.probe import is_ready
from services.common.server import ServiceHost, security
from services.common.tls import PeerTls
from tests.support.certificates import Authority, Identity
from tests.support.rpc import ONCE, SERVICE, TENANT, echo_service, running_host

EVERYWHERE = "0.0.0.0:0"


async def once(request: bytes, context: Any) -> bytes:
    return b"here"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(authority: Authority) -> Identity:
    return authority.issue("server")


def tls_settings(identity: Identity, **changes: Any) -> ServiceSettings:
    return ServiceSettings(tls_cert_file=identity.cert_file, tls_key_file=identity.key_file, **changes)


async def answer(settings: ServiceSettings, tls: PeerTls | None) -> bytes:
    async with running_host(echo_service(once=once), settings) as (_, address):
        channel: Any = open_channel(address, tls=tls)
        async with channel:
            reply = await channel.unary_unary(ONCE)(b"", metadata=TENANT, timeout=5)
            assert isinstance(reply, bytes)
            return reply


async def refusal(settings: ServiceSettings, tls: PeerTls | None) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await answer(settings, tls)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    return refused.value.details() or ""


async def test_a_call_over_tls(authority: Authority, server: Identity) -> None:
    assert await answer(tls_settings(server), PeerTls(authority.ca_file)) == b"here"


async def test_a_call_over_mutual_tls(authority: Authority, server: Identity) -> None:
    client = authority.issue("client", host="client.internal")
    settings = tls_settings(server, tls_client_ca_file=authority.ca_file)
    tls = PeerTls(authority.ca_file, client.cert_file, client.key_file)
    assert await answer(settings, tls) == b"here"


async def test_row_117_plain_text_to_a_tls_port(server: Identity, capfd: pytest.CaptureFixture[str]) -> None:
    await refusal(tls_settings(server), None)
    assert "WRONG_VERSION_NUMBER" in log_of_core(capfd)


async def test_row_117_tls_to_a_plain_text_port(authority: Authority) -> None:
    assert "WRONG_VERSION_NUMBER" in await refusal(ServiceSettings(), PeerTls(authority.ca_file))


async def test_row_117_a_port_that_refused_plain_text_still_serves(
    authority: Authority, server: Identity
) -> None:
    async with running_host(echo_service(once=once), tls_settings(server)) as (_, address):
        plain: Any = open_channel(address)
        secure: Any = open_channel(address, tls=PeerTls(authority.ca_file))
        async with plain, secure:
            with pytest.raises(grpc.aio.AioRpcError):
                await plain.unary_unary(ONCE)(b"", metadata=TENANT, timeout=5)
            assert await secure.unary_unary(ONCE)(b"", metadata=TENANT, timeout=5) == b"here"


async def test_row_118_an_expired_certificate(authority: Authority) -> None:
    settings = tls_settings(authority.issue("server", ended=True))
    assert "certificate has expired" in await refusal(settings, PeerTls(authority.ca_file))


async def test_row_118_a_certificate_for_another_name(authority: Authority) -> None:
    settings = tls_settings(authority.issue("server", host="elsewhere.internal"))
    assert "Hostname Verification Check failed" in await refusal(settings, PeerTls(authority.ca_file))


async def test_row_118_a_certificate_of_an_authority_that_is_not_trusted(
    server: Identity, tmp_path: Path
) -> None:
    other = Authority(tmp_path, "other")
    assert "CERTIFICATE_VERIFY_FAILED" in await refusal(tls_settings(server), PeerTls(other.ca_file))


async def test_row_118_a_client_without_a_certificate(
    authority: Authority, server: Identity, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = tls_settings(server, tls_client_ca_file=authority.ca_file)
    await refusal(settings, PeerTls(authority.ca_file))
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in log_of_core(capfd)


@pytest.mark.parametrize("kind", ["foreign", "expired"])
async def test_row_118_a_client_with_a_certificate_that_is_no_good(
    kind: str, authority: Authority, server: Identity, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signer = Authority(tmp_path, "other") if kind == "foreign" else authority
    client = signer.issue("client", ended=kind == "expired")
    settings = tls_settings(server, tls_client_ca_file=authority.ca_file)
    await refusal(settings, PeerTls(authority.ca_file, client.cert_file, client.key_file))
    assert "CERTIFICATE_VERIFY_FAILED" in log_of_core(capfd)


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
async def test_row_118_old_versions_of_tls(
    version: str, authority: Authority, server: Identity, capfd: pytest.CaptureFixture[str]
) -> None:
    def handshake(host: str, port: int, version: str) -> str | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context = ssl.create_default_context(cafile=str(authority.ca_file))
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((host, port), timeout=5) as connection,
            context.wrap_socket(connection, server_hostname=host) as end,
        ):
            return end.version()

    async with running_host(echo_service(once=once), tls_settings(server)) as (_, address):
        host, _, port = address.rpartition(":")
        newest = await asyncio.to_thread(handshake, host, int(port), "TLSv1_2")
        assert newest == "TLSv1.2"
        assert "UNSUPPORTED_PROTOCOL" not in log_of_core(capfd)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.to_thread(handshake, host, int(port), version)
    assert "UNSUPPORTED_PROTOCOL" in log_of_core(capfd)


async def start_error(settings: ServiceSettings) -> FailedPrecondition:
    host = ServiceHost(settings, [SERVICE])
    with pytest.raises(FailedPrecondition) as refused:
        await host.start()
    await host.stop(grace_seconds=0)
    return refused.value


async def test_row_118_a_key_of_another_certificate_stops_the_start(
    authority: Authority, server: Identity
) -> None:
    other = authority.issue("other")
    error = await start_error(ServiceSettings(tls_cert_file=server.cert_file, tls_key_file=other.key_file))
    assert error.reason == "tls_bad_pair"
    assert "KEY_VALUES_MISMATCH" in error.message
    assert str(other.key_file) in error.message
    with pytest.raises(FailedPrecondition, match="KEY_VALUES_MISMATCH"):
        open_channel("127.0.0.1:1", tls=PeerTls(authority.ca_file, server.cert_file, other.key_file))


async def test_row_118_files_that_are_missing_or_hold_something_else_stop_the_start(
    authority: Authority, server: Identity, tmp_path: Path
) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.touch()
    error = await start_error(ServiceSettings(tls_cert_file=missing, tls_key_file=server.key_file))
    assert (error.reason, error.value) == ("tls_file_unreadable", repr(str(missing)))
    error = await start_error(tls_settings(server, tls_client_ca_file=empty))
    assert (error.reason, error.value) == ("tls_bad_authority", repr(str(empty)))
    assert (
        await start_error(ServiceSettings(tls_cert_file=empty, tls_key_file=empty))
    ).reason == "tls_bad_pair"
    with pytest.raises(FailedPrecondition, match="tls_bad_authority"):
        open_channel("127.0.0.1:1", tls=PeerTls(empty))


async def test_row_119_beyond_loopback_only_with_mutual_tls_or_when_told_to(
    authority: Authority, server: Identity
) -> None:
    plain = ServiceSettings(listen=EVERYWHERE)
    one_sided = tls_settings(server, listen=EVERYWHERE)
    for settings in (plain, one_sided):
        with pytest.raises(FailedPrecondition, match="insecure_bind"):
            ServiceHost(settings, [SERVICE])
    mutual = tls_settings(server, listen=EVERYWHERE, tls_client_ca_file=authority.ca_file)
    told = ServiceSettings(listen=EVERYWHERE, insecure_bind=True)
    for settings in (mutual, told):
        ServiceHost(settings, [SERVICE])
    assert [security(s) for s in (plain, one_sided, mutual)] == ["plaintext", "tls", "mutual_tls"]


def test_certificate_and_key_go_together(server: Identity) -> None:
    with pytest.raises(ValueError, match="TLS_CERT_FILE and TLS_KEY_FILE go together"):
        ServiceSettings(tls_cert_file=server.cert_file)
    with pytest.raises(ValueError, match="TLS_CLIENT_CA_FILE needs TLS_CERT_FILE"):
        ServiceSettings(tls_client_ca_file=server.cert_file)


async def test_the_probe_speaks_tls(authority: Authority, server: Identity) -> None:
    client = authority.issue("client", host="client.internal")
    settings = tls_settings(server, tls_client_ca_file=authority.ca_file)
    tls = PeerTls(authority.ca_file, client.cert_file, client.key_file)
    async with running_host(echo_service(once=once), settings) as (_, address):
        assert await asyncio.to_thread(is_ready, address, tls=tls)
        assert not await asyncio.to_thread(is_ready, address, timeout_seconds=0.5)


def log_of_core(capfd: pytest.CaptureFixture[str]) -> str:
    """What gRPC's C code has written to standard error."""
    return capfd.readouterr().err
