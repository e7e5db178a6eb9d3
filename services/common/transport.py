"""Limits of the gRPC transport that both ends must agree on."""

from __future__ import annotations

from typing import Final

MESSAGE_LIMIT_BYTES: Final = 4 * 1024 * 1024
"""Largest message; whatever may be larger travels as a stream of chunks."""

CHUNK_BYTES: Final = 256 * 1024
"""Bytes per message where a blob is streamed."""

METADATA_LIMIT_BYTES: Final = 16 * 1024
"""Largest metadata of a call; one fixed limit, since between a soft and a hard one gRPC refuses at random."""
