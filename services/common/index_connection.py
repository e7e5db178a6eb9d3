"""Connections to the index (Redis or Valkey), with settings that never count a command twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import SecretStr
from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.common.errors import Unavailable

COMMAND_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 2.0
HEALTH_CHECK_SECONDS = 15
MAX_CONNECTIONS = 32
RETRY_AFTER_SECONDS = 1.0

# Answers of a server that works, but not for us or not now. All others are mistakes in our commands.
_REFUSALS = (
    "NOREPLICAS",
    "MISCONF",
    "CLUSTERDOWN",
    "MASTERDOWN",
    "TRYAGAIN",
    "MOVED",
    "ASK",
    "NOPERM",
    "BUSY",
)


def open_index(url: SecretStr, *, blocking: bool = False) -> Redis:
    """Return a client for the index; it connects at its first command and answers in bytes.

    At most `MAX_CONNECTIONS` commands are under way; others wait for a connection as long as for an answer.

    The client never repeats a command by itself: after a time-out nobody knows whether the server has run it,
    and an INCR sent twice counts twice. The caller repeats what is idempotent.

    Args:
        url: `redis://` or `rediss://` URL.
        blocking: for commands that wait on the server (XREAD BLOCK, BLPOP): no time-out on answers. Give such
            commands a connection of their own.
    """
    pool = BlockingConnectionPool.from_url(
        url.get_secret_value(),
        max_connections=MAX_CONNECTIONS,
        timeout=COMMAND_TIMEOUT_SECONDS,
        socket_timeout=None if blocking else COMMAND_TIMEOUT_SECONDS,
        socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
        health_check_interval=HEALTH_CHECK_SECONDS,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )
    return Redis.from_pool(pool)


@contextmanager
def index_errors() -> Iterator[None]:
    """Translate failures to reach the index.

    Raises:
        Unavailable: `store_unavailable`. Errors in our own commands pass through; they are our mistakes.
    """
    try:
        yield
    except (
        exceptions.ConnectionError,
        exceptions.TimeoutError,
        exceptions.ReadOnlyError,
        exceptions.OutOfMemoryError,
        OSError,
    ) as error:
        raise Unavailable(
            "store_unavailable",
            f"the index does not answer ({type(error).__name__})",
            retry_after_seconds=RETRY_AFTER_SECONDS,
        ) from error
    except exceptions.ResponseError as error:
        answer = str(error).partition(" ")[0]
        if answer not in _REFUSALS:
            raise
        raise Unavailable(
            "store_unavailable", f"the index answers {answer}", retry_after_seconds=RETRY_AFTER_SECONDS
        ) from error


async def ping(index: Redis) -> None:
    """Return when the index answers; raise `Unavailable` (`store_unavailable`) when it does not."""
    with index_errors():
        await index.ping()
