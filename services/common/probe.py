"""Ask a running service whether it is ready: `python -m services.common.probe TARGET`.

TARGET is `HOST:PORT` of a gRPC service, asked by the standard health call, or an `http://` URL. The exit
code is 0 when it is ready and 1 otherwise, as container health checks want it.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_HTTP_OK = 200


def is_ready(target: str, *, timeout_seconds: float = 2.0) -> bool:
    """Return whether `target` answers that it is ready, within `timeout_seconds`."""
    if target.startswith(("http://", "https://")):
        return _http_answers(target, timeout_seconds)
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_seconds
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _http_answers(url: str, timeout_seconds: float) -> bool:
    try:
        # Only http and https come here.
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:  # noqa: S310
            return bool(answer.status == _HTTP_OK)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def main() -> int:
    """Probe the target that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m services.common.probe")
    parser.add_argument("target", help="HOST:PORT of a gRPC service, or a URL")
    parser.add_argument("--timeout-seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    return 0 if is_ready(arguments.target, timeout_seconds=arguments.timeout_seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
