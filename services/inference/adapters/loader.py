"""The threads that bring adapters from the registry and the disk to the host."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from services.common.errors import Internal, LorafleetError, Unavailable
from services.inference.adapters.disk import DiskTier, Fetcher
from services.inference.adapters.entry import AdapterEntry
from services.inference.adapters.stages import Stage
from services.inference.adapters.weights import AdapterWeights

logger = logging.getLogger(__name__)

_RETRY_AFTER_SECONDS = 1.0


class Reader(Protocol):
    """From a folder to tensors in host memory; both are called on loader threads."""

    def size_bytes(self, folder: Path) -> int:
        """Return the bytes that `read` will take, cheaply."""

    def read(self, folder: Path) -> AdapterWeights:
        """Read the adapter in `folder`, which must be one that can be served here."""


class LoadOwner(Protocol):
    """Who is told of loads: the cache."""

    def reserve(self, entry: AdapterEntry, size_bytes: int) -> bool:
        """Take host bytes for a load, or refuse it for now; the owner starts it again then."""

    def loaded(self, entry: AdapterEntry, weights: AdapterWeights) -> None:
        """Take the weights over."""

    def failed(self, entry: AdapterEntry, error: LorafleetError) -> None:
        """Note that a load failed, and give its bytes back."""


class AdapterLoader:
    """Loads adapters on threads of their own.

    Downloads mostly wait, so many may be under way; what a disk has is read on other threads, so that no slow
    download holds up an adapter that is here. Reading takes processor time from the device thread, so it is
    bounded whichever thread does it.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        disk: DiskTier,
        reader: Reader,
        owner: LoadOwner,
        *,
        reader_threads: int,
        download_threads: int,
        is_copied: bool,
    ) -> None:
        """Start no thread before there is a load.

        Args:
            is_copied: whether the weights are to lie in page-locked memory, from which a GPU reads.
        """
        self._fetcher = fetcher
        self._disk = disk
        self._reader = reader
        self._owner = owner
        self._is_copied = is_copied
        self._reading: AbstractContextManager[object] = threading.BoundedSemaphore(reader_threads)
        self._readers = ThreadPoolExecutor(reader_threads, thread_name_prefix="adapter-read")
        self._downloaders = ThreadPoolExecutor(download_threads, thread_name_prefix="adapter-fetch")

    def start(self, entry: AdapterEntry) -> None:
        """Begin to load; the owner hears of the end on a thread of the loader."""
        pool = self._readers if entry.digest in self._disk else self._downloaders
        pool.submit(self._load, entry)

    def close(self) -> None:
        """Wait for the loads under way; those not yet begun are dropped."""
        self._downloaders.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _load(self, entry: AdapterEntry) -> None:
        try:
            weights = self._weights(entry)
        except LorafleetError as error:
            self._owner.failed(entry, error)
        except OSError as error:
            logger.exception("the disk failed while adapter %s was loaded", entry.digest)
            self._owner.failed(entry, _disk_failed(error))
        except (
            Exception
        ) as error:  # A loader must report whatever happens, or its requests would wait for ever.
            logger.exception("loading adapter %s failed", entry.digest)
            message = f"The adapter could not be loaded: {type(error).__name__}."
            self._owner.failed(entry, Internal("adapter_load_failed", message))
        else:
            if weights is not None:
                self._owner.loaded(entry, weights)

    def _weights(self, entry: AdapterEntry) -> AdapterWeights | None:
        """Load the adapter; None where the host has no room now."""
        with self._disk.open(entry.digest, self._fetcher, entry.times) as folder, self._reading:
            with entry.times.measure(Stage.PARSE):
                size_bytes = self._reader.size_bytes(folder)
            if not self._owner.reserve(entry, size_bytes):
                return None
            with entry.times.measure(Stage.PARSE):
                weights = self._reader.read(folder)
            if self._is_copied:
                with entry.times.measure(Stage.COPY):
                    weights = weights.pinned()
            return weights


def _disk_failed(error: OSError) -> Unavailable:
    return Unavailable(
        "adapter_unavailable",
        f"The disk of adapters failed here: {error.strerror or type(error).__name__}.",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )
