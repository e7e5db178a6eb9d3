"""Where the checkpoints of a job lie in the object store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from services.common.errors import DataLoss
from services.common.failpoints import failpoint
from services.common.store import ObjectNotFoundError, ObjectStore

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
FILES = (STATE, OPTIMIZER, BEST, WEIGHTS)


class CheckpointStore:
    """Checkpoints of one job in the object store: the files first, then the manifest that makes them one."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        """Keep checkpoints under `prefix`, one folder each."""
        self._store = store
        self._prefix = prefix

    def save(self, folder: Path, checkpoint_id: str) -> str:
        """Store the files of `folder` under `checkpoint_id` and return the digest of the manifest."""
        entries = []
        for path in sorted(folder.iterdir()):
            self._store.put_file(self._key(checkpoint_id, path.name), path)
            entries.append(
                {"name": path.name, "size_bytes": path.stat().st_size, "digest": _file_digest(path)}
            )
        failpoint("checkpoint.before_manifest")
        manifest = json.dumps({"files": entries}, sort_keys=True).encode("ascii")
        self._store.put(self._key(checkpoint_id, MANIFEST), manifest)
        return _digest(manifest)

    def load(
        self, checkpoint_id: str, manifest_digest: str, folder: Path, *, names: Collection[str] = FILES
    ) -> None:
        """Write the files of a checkpoint to `folder`, those in `names` alone.

        Raises:
            DataLoss: `corrupt_checkpoint`, where a file is missing or not what was stored.
        """
        try:
            manifest = self._store.get(self._key(checkpoint_id, MANIFEST))
            _require(_digest(manifest) == manifest_digest, checkpoint_id, MANIFEST)
            folder.mkdir(parents=True, exist_ok=True)
            for entry in json.loads(manifest)["files"]:
                path = folder / str(entry["name"])
                if path.name not in names:
                    continue
                with path.open("wb") as file:
                    for piece in self._store.stream(self._key(checkpoint_id, path.name)):
                        file.write(piece)
                _require(_file_digest(path) == entry["digest"], checkpoint_id, path.name)
        except ObjectNotFoundError as error:
            raise corrupt_checkpoint(checkpoint_id, str(error)) from error

    def is_kept(self, checkpoint_id: str) -> bool:
        """Return whether the bytes of a checkpoint have not been discarded."""
        try:
            self._store.stat(self._key(checkpoint_id, MANIFEST))
        except ObjectNotFoundError:
            return False
        return True

    def discard(self, checkpoint_ids: Sequence[str]) -> None:
        """Remove the bytes of checkpoints that nothing resumes from any more; the manifest goes first."""
        for checkpoint_id in checkpoint_ids:
            for name in (MANIFEST, *FILES):
                self._store.delete(self._key(checkpoint_id, name))

    def keep_weights(self, checkpoint_ids: Sequence[str]) -> None:
        """Remove what only resuming needs; the checkpoints can still be published."""
        for checkpoint_id in checkpoint_ids:
            for name in FILES:
                if name != WEIGHTS:
                    self._store.delete(self._key(checkpoint_id, name))

    def _key(self, checkpoint_id: str, name: str) -> str:
        return f"{self._prefix}/{checkpoint_id}/{name}"


def corrupt_checkpoint(checkpoint_id: str, text: str) -> DataLoss:
    """Return the error for a checkpoint whose bytes are not what was stored."""
    return DataLoss("corrupt_checkpoint", f"checkpoint {checkpoint_id} cannot be used: {text}")


def _require(holds: bool, checkpoint_id: str, name: str) -> None:
    if not holds:
        raise corrupt_checkpoint(checkpoint_id, f"{name} is not what was stored")


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
