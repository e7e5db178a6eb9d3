"""`python -m services.trainer`: serve until SIGTERM."""

from __future__ import annotations

import asyncio
import sys

from services.common.config import load
from services.trainer.config import TrainerSettings


async def main() -> int:
    """Run the trainer and return its exit code."""
    settings = load(TrainerSettings)
    # Imported here: bad settings need not wait for it.
    from services.common.server import ServiceHost, serve
    from services.trainer.service import SERVICE, TrainerService

    async def register(host: ServiceHost) -> None:
        await TrainerService(settings).register(host)

    return await serve("trainer", settings, register, services=[SERVICE])


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
