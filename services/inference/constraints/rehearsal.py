"""Compiling a constraint first where it can do no harm: in a process that can be killed."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from asyncio.subprocess import Process
from contextlib import suppress

from services.inference.constraints.grammar import ConstraintKind
from services.inference.constraints.vocabulary import Vocabulary

_logger = logging.getLogger("lorafleet.inference")

_START_SECONDS = 30.0
_LINE_BYTES = 1 << 20
_MODULE = "services.inference.constraints.rehearsal_process"


class Rehearsal:
    """One child process, started at the first use and again after each death; one constraint at a time.

    Belongs to one event loop.
    """

    def __init__(self, vocabulary: Vocabulary, *, limit_seconds: float, memory_bytes: int) -> None:
        self._vocabulary = vocabulary
        self._limit_seconds = limit_seconds
        self._memory_bytes = memory_bytes
        self._process: Process | None = None
        self._turn = asyncio.Lock()

    async def refusal(self, kind: ConstraintKind, text: str) -> str | None:
        """Return why a constraint does not compile, or None where it does."""
        async with self._turn:
            try:
                process = await self._running()
                async with asyncio.timeout(self._limit_seconds):
                    return await _asked(process, {"kind": kind.value, "text": text})
            except TimeoutError:
                await self._kill()
                return f"it takes more than {self._limit_seconds:g} s to compile"
            except (EOFError, ConnectionError):
                await self._kill()
                return "compiling it took too much memory or failed"
            except asyncio.CancelledError:
                # An answer that nobody read would be taken for the next one's.
                await self._kill()
                raise

    async def close(self) -> None:
        """End the child process."""
        async with self._turn:
            await self._kill()

    async def _running(self) -> Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                _MODULE,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_BYTES,
            )
            header = {
                "tokens": [token.hex() for token in self._vocabulary.tokens],
                "special_token_ids": self._vocabulary.special_token_ids,
                "eos_token_ids": self._vocabulary.eos_token_ids,
                "memory_bytes": self._memory_bytes,
                "limit_seconds": 2 * self._limit_seconds,
            }
            async with asyncio.timeout(_START_SECONDS):
                await _asked(self._process, header)
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _asked(process: Process, message: dict[str, object]) -> str | None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    await process.stdin.drain()
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    error: str | None = json.loads(line)["error"]
    return error
