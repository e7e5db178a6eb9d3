"""Connections that are slow, torn, too large or ambiguous, by their rows in the fault catalogue."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.fake_base import BASE
from tests.support.fake_inference import Script
from tests.support.gateway import GatewayUnderTest, running_gateway, wait_until

HEADER_SECONDS = 0.6
BODY_SECONDS = 0.6
STALLED_SECONDS = 0.6
PATIENCE_SECONDS = 20.0


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[GatewayUnderTest]:
    with running_gateway(
        tmp_path,
        header_timeout_seconds=HEADER_SECONDS,
        body_timeout_seconds=BODY_SECONDS,
        stalled_timeout_seconds=STALLED_SECONDS,
        max_concurrent_uploads=1,
    ) as running:
        yield running


def connect(gateway: GatewayUnderTest, receive_bytes: int | None = None) -> socket.socket:
    address = urlsplit(gateway.url)
    assert address.hostname is not None
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect((address.hostname, address.port or 0))
    return connection


def to_the_end(connection: socket.socket) -> bytes:
    """Everything until the server closes; a reset is an end too."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def exchange(gateway: GatewayUnderTest, request: bytes) -> bytes:
    with connect(gateway) as connection:
        connection.sendall(request)
        return to_the_end(connection)


def code_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), str(json.loads(body)["error"]["code"])


def post(gateway: GatewayUnderTest, body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {gateway.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    ).encode() + data


def test_row_84_a_head_that_trickles_is_cut_off_and_others_do_not_notice(gateway: GatewayUnderTest) -> None:
    slow = [connect(gateway) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        with gateway.http() as http:
            assert http.get("/health").status_code == 200
        for connection in slow:
            connection.sendall(b"a: b\r\n")
        assert {code_of(to_the_end(connection)) for connection in slow} == {(408, "request_timeout")}
    finally:
        for connection in slow:
            connection.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/files"])
def test_row_84_a_body_that_trickles_is_cut_off(gateway: GatewayUnderTest, path: str) -> None:
    kind = "multipart/form-data; boundary=XX" if path == "/v1/files" else "application/json"
    with connect(gateway) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {gateway.key}\r\n"
            f"content-type: {kind}\r\ncontent-length: 100000\r\n\r\n".encode()
        )
        end = time.monotonic() + PATIENCE_SECONDS
        try:
            while time.monotonic() < end:
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() < end, "a body may trickle for ever"
    # The place of the one upload is free again.
    with gateway.http() as http:
        form = {"file": ("rows.jsonl", b"{}\n")}
        wait_until(
            lambda: http.post("/v1/files", files=form, data={"purpose": "fine-tune"}).status_code == 200
        )


def test_row_84_a_slow_body_that_goes_on_is_read_to_its_end(gateway: GatewayUnderTest) -> None:
    request = post(gateway, {"model": BASE, "prompt": "x" * 300_000})
    with connect(gateway) as connection:
        step = 40_000
        for start in range(0, len(request), step):
            connection.sendall(request[start : start + step])
            time.sleep(BODY_SECONDS / 4)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_row_85_an_answer_that_nobody_reads_frees_its_work(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["endless"] = Script(texts=["x" * 100_000] * 2000)
    with connect(gateway, receive_bytes=4096) as connection:
        connection.sendall(post(gateway, {"model": BASE, "prompt": "endless", "stream": True}))
        wait_until(lambda: gateway.inference.started == 1)
        wait_until(lambda: gateway.inference.cancelled == 1, PATIENCE_SECONDS)
        # The two hundred megabytes were neither sent nor held: what is here was under way.
        assert len(to_the_end(connection)) < 50_000_000


def test_row_85_a_reader_with_pauses_gets_everything(gateway: GatewayUnderTest) -> None:
    gateway.inference.scripts["long"] = Script(texts=["x" * 100_000] * 200)
    with connect(gateway, receive_bytes=65536) as connection:
        connection.sendall(post(gateway, {"model": BASE, "prompt": "long", "stream": True}))
        received, last = 0, b""
        while not last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") and (data := connection.recv(1 << 20)):
            received, last = received + len(data), (last + data)[-40:]
            time.sleep(0.001)
    assert received > 20_000_000


@pytest.mark.parametrize(
    "head",
    [b"a: " + b"x" * (1 << 20) + b"\r\n", b"".join(b"h%d: x\r\n" % number for number in range(10_000))],
)
def test_row_87_heads_are_bounded(gateway: GatewayUnderTest, head: bytes) -> None:
    answer = exchange(gateway, b"GET /health HTTP/1.1\r\nhost: a\r\n" + head + b"\r\n")
    # Where the rest was still coming when the server closed, its answer may be lost on the way.
    assert answer == b"" or code_of(answer) == (431, "headers_too_large")


def test_row_87_a_large_head_is_named(gateway: GatewayUnderTest) -> None:
    answer = exchange(gateway, b"GET /health HTTP/1.1\r\nhost: a\r\na: " + b"x" * (33 * 1024))
    assert code_of(answer) == (431, "headers_too_large")


HIDDEN = b"GET /readyz HTTP/1.1\r\nhost: a\r\n\r\n"
HOST = b"POST /health HTTP/1.1\r\nhost: a\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        HOST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n" + HIDDEN,
        HOST + b"content-length: 0\r\ncontent-length: 5\r\n\r\n" + HIDDEN,
        HOST + b"content-length: 0\r\ncontent-length: 0\r\n\r\n" + HIDDEN,
        HOST + b"content-length: 0, 5\r\n\r\n" + HIDDEN,
        HOST + b"content-length: +5\r\n\r\n" + HIDDEN,
        HOST + b"content-length : 5\r\n\r\n" + HIDDEN,
        HOST + b"a: b\r\n c: d\r\n\r\n" + HIDDEN,
        HOST + b"a: b\r\n\ttransfer-encoding: chunked\r\n\r\n" + HIDDEN,
        b"POST /health HTTP/1.1\nhost: a\n\n" + HIDDEN,
        HOST + b"a: b\ncontent-length: 5\r\n\r\n" + HIDDEN,
        HOST + b"a: b\rcontent-length: 5\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: chunked, identity\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: xchunked\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: chunked\r\n\r\n0;a\n\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: chunked\r\n\r\n0;" + b"a" * 1000 + b"\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n" + HIDDEN,
        HOST + b"transfer-encoding: chunked\r\n\r\n0\r\na: b\n\r\n\r\n" + HIDDEN,
    ],
)
def test_row_89_what_could_be_read_in_two_ways_is_not_read(
    gateway: GatewayUnderTest, request_bytes: bytes
) -> None:
    answer = exchange(gateway, request_bytes)
    assert answer.count(b"HTTP/1.1 ") <= 1
    # A refusal of the method may be on its way before a bad chunk comes.
    assert answer.split()[1:2] in ([b"400"], [b"405"], [b"501"], []), answer
    assert b"readyz" not in answer
    assert b"not_ready" not in answer


def test_row_89_two_plain_requests_after_each_other_are_two(gateway: GatewayUnderTest) -> None:
    request = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    chunked = b"POST /health HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;a=b\r\nx\r\n0\r\n\r\n"
    answer = exchange(gateway, request + chunked + last)
    assert re.findall(rb"HTTP/1\.1 (\d+)", answer) == [b"200", b"405", b"200"]


def test_row_90_who_calls_is_not_what_a_header_says(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"x-forwarded-for": "203.0.113.7", "forwarded": "for=203.0.113.7", "x-real-ip": "203.0.113.7"}
    with caplog.at_level("INFO", logger="lorafleet.access"), gateway.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 200
        wait_until(lambda: any(record.name == "lorafleet.access" for record in caplog.records))
    peers = {record.__dict__["peer"] for record in caplog.records if "peer" in record.__dict__}
    assert "203.0.113.7" not in peers


def test_row_99_no_page_of_another_origin_may_read_an_answer(gateway: GatewayUnderTest) -> None:
    with gateway.http() as http:
        for method in ("GET", "OPTIONS"):
            headers = {"origin": "https://elsewhere.example", "access-control-request-method": "GET"}
            response = http.request(method, "/v1/models", headers=headers)
            assert not [name for name in response.headers if name.startswith("access-control-")]
            assert "set-cookie" not in response.headers
