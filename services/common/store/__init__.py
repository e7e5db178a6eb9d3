"""The object store: one small interface, a directory or any S3 behind it."""

from services.common.store.directory import DirectoryStore
from services.common.store.interface import (
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectStat,
    ObjectStore,
    checked_key,
)
from services.common.store.open import open_store
from services.common.store.s3 import S3Store

__all__ = [
    "DirectoryStore",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "ObjectStat",
    "ObjectStore",
    "S3Store",
    "checked_key",
    "open_store",
]
