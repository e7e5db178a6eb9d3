"""Adding to a job's history for as long as it takes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from services.common.errors import Unavailable
from services.trainer.book import Claim, JobBook
from services.trainer.job import Draft
from services.trainer.validator import RETRY_SECONDS

_logger = logging.getLogger("lorafleet.trainer.worker")


async def append_patiently(book: JobBook, claim: Claim, drafts: Sequence[Draft]) -> None:
    """Add `drafts`, waiting for store and index where they do not answer.

    Raises:
        StaleLeaseError: another process has taken the job over.
    """
    while True:
        try:
            await book.append(claim, drafts)
        except Unavailable as error:
            _logger.warning("cannot record", extra={"job": claim.job.id, "reason": error.reason})
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return
