"""Limits and timings of the gRPC transport that both ends must agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MESSAGE_LIMIT_BYTES: Final = 4 * 1024 * 1024
"""Largest message; whatever may be larger travels as a stream of chunks."""

MESSAGE_HARD_LIMIT_BYTES: Final = 2 * MESSAGE_LIMIT_BYTES
"""Where gRPC itself stops reading a message. Up to here a server can say what was wrong with it."""

CHUNK_BYTES: Final = 256 * 1024
"""Bytes per message where a blob is streamed."""

WINDOW_BYTES: Final = 512 * 1024
"""Bytes of one stream that may be under way, or lie unread at the receiver's end."""

METADATA_LIMIT_BYTES: Final = 16 * 1024
"""Largest metadata of a call; one fixed limit, since between a soft and a hard one gRPC refuses at random."""

MAX_CONCURRENT_STREAMS: Final = 1024
"""Calls at a time over one connection; a client holds back those above."""

MIN_PING_INTERVAL_SECONDS: Final = 10.0
"""A client that pings more often while the server sends it nothing loses its connection."""


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """HTTP/2 pings that find dead connections while calls are under way.

    By default a peer that vanishes without a word is noticed after at most 25 s.
    """

    interval_seconds: float = 20.0
    timeout_seconds: float = 5.0


KEEPALIVE: Final = KeepAlive()


def transport_options(keepalive: KeepAlive) -> list[tuple[str, int]]:
    """Return the gRPC options that servers and channels share."""
    return [
        ("grpc.max_send_message_length", MESSAGE_HARD_LIMIT_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_HARD_LIMIT_BYTES),
        ("grpc.max_metadata_size", METADATA_LIMIT_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_LIMIT_BYTES),
        ("grpc.keepalive_time_ms", int(keepalive.interval_seconds * 1000)),
        # gRPC waits for the answer to a ping by the second of these and takes a minute by default.
        ("grpc.keepalive_timeout_ms", int(keepalive.timeout_seconds * 1000)),
        ("grpc.http2.ping_timeout_ms", int(keepalive.timeout_seconds * 1000)),
        # A stream may be quiet for long; without this a channel stops to ping after two of them.
        ("grpc.http2.max_pings_without_data", 0),
        # Else the windows grow with the link, to where gRPC holds whole adapters that nobody has read yet.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ]


def channel_options(keepalive: KeepAlive = KEEPALIVE) -> list[tuple[str, int]]:
    """Return the gRPC options of every channel to a service of ours."""
    return [
        *transport_options(keepalive),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 5000),
        # Two channels to one address share nothing, so closing one cannot disturb the other.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(keepalive: KeepAlive = KEEPALIVE) -> list[tuple[str, int]]:
    """Return the gRPC options of every server of ours."""
    return [
        *transport_options(keepalive),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_PING_INTERVAL_SECONDS * 1000)),
    ]
