"""The gateway as a process: keys from the command line, start, drain at SIGTERM, refusals to start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.fake_services import BASE, Script
from tests.support.gateway import PEPPER, GatewayUnderTest, running_gateway, sse_objects, wait_until


def environment(folder: Path, **variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LORAFLEET_")}
    ours = {
        "LORAFLEET_GATEWAY_LISTEN": "127.0.0.1:0",
        "LORAFLEET_GATEWAY_STORE_URL": f"file://{folder}/store",
        "LORAFLEET_GATEWAY_KEY_PEPPER": PEPPER,
        "LORAFLEET_PORT_FILE": str(folder / "address"),
        **variables,
    }
    return inherited | ours


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.gateway", *arguments],
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


def targets(behind: GatewayUnderTest) -> dict[str, str]:
    return {f"LORAFLEET_GATEWAY_{name.upper()}_TARGET": target for name, target in behind.targets.items()}


def test_a_stream_in_flight_ends_whole_at_sigterm(behind: GatewayUnderTest, tmp_path: Path) -> None:
    made = run(tmp_path, "create-key", "--tenant", "acme")
    assert made.returncode == 0, made.stderr
    headers = {"authorization": f"Bearer {made.stdout.strip()}"}
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


def test_keys_are_made_limited_and_revoked_from_the_command_line(
    behind: GatewayUnderTest, tmp_path: Path
) -> None:
    key = run(tmp_path, "create-key", "--scopes", "files").stdout.strip()
    with behind.http(key) as http:
        assert http.get("/v1/files").status_code == 200
        assert http.get("/v1/adapters").status_code == 403
    assert run(tmp_path, "revoke-key", key.split("-")[1]).returncode == 0
    again = run(tmp_path, "revoke-key", key.split("-")[1])
    assert (again.returncode, "key_not_found" in again.stderr) == (1, True)
    refused = run(tmp_path, "create-key", "--tenant", "No Tenant")
    assert (refused.returncode, refused.stdout, "bad_tenant" in refused.stderr) == (1, "", True)


@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"LORAFLEET_GATEWAY_KEY_PEPPER": "short"}, 2, "LORAFLEET_GATEWAY_KEY_PEPPER"),
        ({"LORAFLEET_GATEWAY_LISTN": "x"}, 2, "LORAFLEET_GATEWAY_LISTN"),
        ({"LORAFLEET_GATEWAY_LISTEN": "0.0.0.0:0"}, 1, "insecure_bind"),
        (
            # An address of no machine, so it cannot be bound.
            {"LORAFLEET_GATEWAY_LISTEN": "192.0.2.1:8000", "LORAFLEET_GATEWAY_INSECURE_BIND": "true"},
            1,
            "cannot start",
        ),
    ],
)
def test_it_refuses_to_start(tmp_path: Path, variables: dict[str, str], code: int, said: str) -> None:
    ended = run(tmp_path, **variables)
    assert (ended.returncode, said in ended.stderr) == (code, True), ended.stderr
