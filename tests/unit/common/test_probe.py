"""The health probe against real servers."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common.probe import is_ready

NOBODY = "127.0.0.1:9"


class Door(BaseHTTPRequestHandler):
    """Ready on one path, not ready on the others."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the overridden one
        """Say nothing."""


@pytest.fixture
def door() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_grpc_health_decides() -> None:
    servicer = health.HealthServicer()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert not is_ready(f"127.0.0.1:{port}")
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        assert is_ready(f"127.0.0.1:{port}")
    finally:
        server.stop(0).wait()
    assert not is_ready(f"127.0.0.1:{port}", timeout_seconds=0.5)


def test_an_http_status_decides(door: str) -> None:
    assert is_ready(f"{door}/readyz")
    assert not is_ready(f"{door}/other")
    assert not is_ready(f"http://{NOBODY}/readyz", timeout_seconds=0.5)


@pytest.mark.parametrize(("path", "code"), [("readyz", 0), ("other", 1)])
def test_the_exit_code_tells(door: str, path: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.common.probe", f"{door}/{path}"], timeout=30, check=False
    )
    assert done.returncode == code
