"""The gateway as a process: keys from the command line, start, drain at SIGTERM, refusals to start."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from services.gateway.__main__ import main
from services.gateway.keys import KeyLimits, Scope
from services.gateway.limits import Bucket, LocalLimiter
from tests.support.certificates import Authority
from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import PEPPER, GatewayUnderTest, running_gateway, sse_objects, wait_until


def environment(folder: Path, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LORAFLEET_")}
    ours = {
        "LORAFLEET_GATEWAY_LISTEN": "127.0.0.1:0",
        "LORAFLEET_GATEWAY_STORE_URL": f"file://{folder}/store",
        "LORAFLEET_GATEWAY_KEY_PEPPER": PEPPER,
        "LORAFLEET_GATEWAY_REPLICA_WAIT_SECONDS": "0",
        "LORAFLEET_PORT_FILE": str(folder / "address"),
        **variables,
    }
    return inherited | ours


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        env=environment(folder, **variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def process(folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a gateway and yield it with its URL."""
    child = subprocess.Popen(
        [sys.executable, "-m", "services.gateway"],
        env=environment(folder, **variables),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until((folder / "address").exists, 60)
        yield child, f"http://{(folder / 'address').read_text().strip()}"
    finally:
        child.kill()
        child.communicate(timeout=10)


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[GatewayUnderTest]:
    """Services for the process to stand before; the gateway that comes with them is not used."""
    with running_gateway(tmp_path) as running:
        yield running


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a gateway, in this process."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def targets(behind: GatewayUnderTest) -> dict[str, str]:
    return {f"LORAFLEET_GATEWAY_{name.upper()}_TARGET": target for name, target in behind.targets.items()}


def test_a_stream_in_flight_ends_whole_at_sigterm(behind: GatewayUnderTest, tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {behind.key}"}
    behind.inference.scripts["long"] = Script(texts=["x"] * 20, pause_seconds=0.05)
    texts: list[str] = []
    with process(tmp_path, **targets(behind)) as (child, url):
        assert httpx.get(f"{url}/readyz").status_code == 200

        def read() -> None:
            body = {"model": BASE, "prompt": "long", "stream": True}
            texts.append(httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30).text)

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: behind.inference.started == 1)
        child.send_signal(signal.SIGTERM)
        reading.join(30)
        assert child.wait(30) == 0
    objects, is_done = sse_objects(texts[0])
    assert is_done
    assert "".join(item["choices"][0]["text"] for item in objects) == "x" * 20


def test_an_idle_connection_is_kept_longer_than_clients_keep_it(
    behind: GatewayUnderTest, tmp_path: Path
) -> None:
    """Stock clients use a connection again for five seconds: one that we close just then fails a request."""
    with process(tmp_path, **targets(behind)) as (_, url):
        connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.connect()
        # It would connect again without a word.
        connection.auto_open = 0
        for pause_seconds in (0.0, 6.0):
            time.sleep(pause_seconds)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
        connection.close()


def test_keys_are_made_limited_and_revoked_from_the_command_line(
    behind: GatewayUnderTest, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return code, *capsys.readouterr()

    key = verb("create-key", "--scopes", "files")[1].strip()
    with behind.http(key) as http:
        assert http.get("/v1/files").status_code == 200
        assert http.get("/v1/adapters").status_code == 403
    assert verb("revoke-key", key.split("-")[1]) == (0, "", "")
    code, _, said = verb("revoke-key", key.split("-")[1])
    assert (code, "key_not_found" in said) == (1, True)
    code, printed, said = verb("create-key", "--tenant", "No Tenant")
    assert (code, printed, "bad_tenant" in said) == (1, "", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("LORAFLEET_GATEWAY_KEY_PEPPER", "tooshort"), ("LORAFLEET_GATEWAY_LISTN", "x")],
)
def test_a_bad_configuration_is_named_and_not_shown(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["create-key"])
    said = capsys.readouterr().err
    assert (ended.value.code, name in said, "tooshort" in said) == (2, True, False)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LORAFLEET_GATEWAY_LISTEN": "0.0.0.0:0"}, "insecure_bind"),
        (
            # An address of no machine, so it cannot be bound.
            {"LORAFLEET_GATEWAY_LISTEN": "192.0.2.1:8000", "LORAFLEET_GATEWAY_INSECURE_BIND": "true"},
            "cannot start",
        ),
    ],
)
def test_it_refuses_to_start(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    ended = run(tmp_path, **variables)
    assert (ended.returncode, said in ended.stderr) == (1, True), ended.stderr


def test_https_with_a_certificate(tmp_path: Path, behind: GatewayUnderTest) -> None:
    authority = Authority(tmp_path)
    identity, other = authority.issue("gateway"), authority.issue("other")
    files = {
        "LORAFLEET_GATEWAY_TLS_CERT_FILE": str(identity.cert_file),
        "LORAFLEET_GATEWAY_TLS_KEY_FILE": str(identity.key_file),
    }
    with process(tmp_path, **targets(behind), **files) as (child, url):
        context = ssl.create_default_context(cafile=str(authority.ca_file))
        secure_url = url.replace("http://", "https://")
        assert httpx.get(f"{secure_url}/health", verify=context, timeout=10).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", timeout=10)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    mismatched = run(tmp_path, **files | {"LORAFLEET_GATEWAY_TLS_KEY_FILE": str(other.key_file)})
    assert mismatched.returncode == 1
    assert "KEY_VALUES_MISMATCH" in mismatched.stderr


def test_row_138_a_killed_gateway_leaves_a_broken_connection_and_no_reservation(
    behind: GatewayUnderTest, tmp_path: Path, redis_url: str
) -> None:
    """kill -9 with a body half read, in a stream, and around a revocation."""
    behind.inference.scripts["long"] = Script(texts=["x"], hang=True)
    _, limited = behind.keys.make("default", tuple(Scope), limits=KeyLimits(tokens_per_minute=60_000))
    key_id = limited.split("-")[1]
    headers = {"authorization": f"Bearer {limited}"}
    variables = {**targets(behind), "LORAFLEET_GATEWAY_REDIS_URL": redis_url}
    with process(tmp_path, **variables) as (child, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as half_sent:
            half_sent.sendall(
                f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {limited}\r\n"
                'content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"mod'.encode()
            )
            body = {"model": BASE, "prompt": "long", "stream": True, "max_tokens": 58_000}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
                lines = answer.iter_lines()
                assert '"x"' in next(lines)
                revoked = httpx.delete(f"{url}/v1/keys/{key_id}", headers=headers)
                assert revoked.status_code == 200
                child.kill()
                with pytest.raises(httpx.HTTPError):
                    list(lines)
            with suppress(ConnectionError):
                assert half_sent.recv(4096) == b""
    # What was told is so, and the work behind has ended.
    wait_until(lambda: behind.inference.cancelled == 1)
    (tmp_path / "address").unlink()
    _, other = behind.keys.make("default", tuple(Scope))
    with process(tmp_path, **variables) as (_, url):
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {other}"}).status_code == 200


async def test_row_138_what_nobody_settles_is_back_within_a_minute() -> None:
    now = 0.0
    limiter = LocalLimiter(lambda: now)
    bucket = Bucket("k:tokens", "tokens", 60_000, 58_000.0)
    assert (await limiter.take([bucket])).is_granted
    assert not (await limiter.take([bucket])).is_granted
    now = 60.0
    assert (await limiter.take([bucket])).is_granted
