"""Ask a running service whether it is ready: `python -m services.common.probe TARGET`.

TARGET is `HOST:PORT` of a gRPC service, asked by the standard health call, or an `http://` URL. The exit
code is 0 when it is ready and 1 otherwise, as container health checks want it.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.tls import PeerTls

_HTTP_OK = 200


def is_ready(target: str, *, timeout_seconds: float = 2.0, tls: PeerTls | None = None) -> bool:
    """Return whether `target` answers that it is ready, within `timeout_seconds`.

    Raises:
        FailedPrecondition: the files of `tls` cannot be used.
    """
    if target.startswith(("http://", "https://")):
        return _http_answers(target, timeout_seconds)
    with _channel(target, tls) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_seconds
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _channel(target: str, tls: PeerTls | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(target)
    return grpc.secure_channel(target, tls.credentials())


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
    parser.add_argument("--ca-file", type=Path, help="authorities of the server, PEM: ask over TLS")
    parser.add_argument("--cert-file", type=Path, help="certificate to show, PEM; needs --key-file")
    parser.add_argument("--key-file", type=Path, help="its private key, PEM")
    arguments = parser.parse_args()
    if (arguments.cert_file is None) != (arguments.key_file is None) or (
        arguments.cert_file is not None and arguments.ca_file is None
    ):
        parser.error("--cert-file and --key-file go together and need --ca-file")
    tls = None
    if arguments.ca_file is not None:
        tls = PeerTls(arguments.ca_file, arguments.cert_file, arguments.key_file)
    return 0 if is_ready(arguments.target, timeout_seconds=arguments.timeout_seconds, tls=tls) else 1


if __name__ == "__main__":
    sys.exit(main())
