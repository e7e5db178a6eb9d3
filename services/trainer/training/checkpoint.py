"""What a run needs to go on: weights, optimizer moments, step and figures. Safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from services.common.errors import DataLoss
from services.common.failpoints import failpoint
from services.common.store import ObjectNotFoundError, ObjectStore
from services.trainer.training.adapter import TrainableAdapter
from services.trainer.training.optimizers import load_state_tensors, state_tensors

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
BEST = "best.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class StepFigures:
    """One row of the metrics file."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None


@dataclass(slots=True)
class RunState:
    """Where a run stands between two steps. Order, dropout and learning rate follow from seed and step.

    Attributes:
        bad_steps: steps in a row, up to now, whose loss or gradient was not finite.
        train_seconds: time spent in steps, over all attempts.
        best_valid_loss: the lowest validation loss, where early stopping looks for it.
        stale_validations: validations since then.
        is_stopped: whether early stopping has ended the run.
    """

    step: int = 0
    trained_tokens: int = 0
    bad_steps: int = 0
    train_seconds: float = 0.0
    best_valid_loss: float | None = None
    stale_validations: int = 0
    is_stopped: bool = False
    figures: list[StepFigures] = field(default_factory=list)


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

    def load(self, checkpoint_id: str, manifest_digest: str, folder: Path) -> None:
        """Write the files of a checkpoint to `folder`.

        Raises:
            DataLoss: `corrupt_checkpoint`, where a file is missing or not what was stored.
        """
        try:
            manifest = self._store.get(self._key(checkpoint_id, MANIFEST))
            _require(_digest(manifest) == manifest_digest, checkpoint_id, MANIFEST)
            folder.mkdir(parents=True, exist_ok=True)
            for entry in json.loads(manifest)["files"]:
                path = folder / str(entry["name"])
                with path.open("wb") as file:
                    for piece in self._store.stream(self._key(checkpoint_id, path.name)):
                        file.write(piece)
                _require(_file_digest(path) == entry["digest"], checkpoint_id, path.name)
        except ObjectNotFoundError as error:
            raise _corrupt(checkpoint_id, str(error)) from error

    def discard(self, checkpoint_ids: Sequence[str]) -> None:
        """Remove the bytes of checkpoints that nothing resumes from any more; the manifest goes first."""
        for checkpoint_id in checkpoint_ids:
            for name in (MANIFEST, STATE, OPTIMIZER, BEST, WEIGHTS):
                self._store.delete(self._key(checkpoint_id, name))

    def _key(self, checkpoint_id: str, name: str) -> str:
        return f"{self._prefix}/{checkpoint_id}/{name}"


def write_run(
    folder: Path,
    adapter: TrainableAdapter,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    best: dict[str, torch.Tensor] | None,
) -> None:
    """Write the files of a checkpoint to the empty folder `folder`; `best`: weights of the lowest loss."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = adapter.parameters()
    save_file(_on_cpu(parameters | adapter.constants()), folder / WEIGHTS)
    save_file(state_tensors(optimizer, parameters), folder / OPTIMIZER)
    if best is not None:
        save_file(_on_cpu(best), folder / BEST)
    (folder / STATE).write_text(json.dumps(asdict(state), allow_nan=False), encoding="ascii")


def read_run(
    folder: Path, adapter: TrainableAdapter, optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, torch.Tensor] | None]:
    """Load the files of a checkpoint into adapter and optimizer; return the run's state and its best weights.

    Raises:
        DataLoss: `corrupt_checkpoint`, where the tensors are not those of this adapter.
    """
    read_weights(folder, adapter)
    load_state_tensors(optimizer, adapter.parameters(), load_file(folder / OPTIMIZER))
    raw: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="ascii"))
    figures = [StepFigures(**row) for row in raw.pop("figures")]
    best = load_file(folder / BEST) if (folder / BEST).exists() else None
    return RunState(**raw, figures=figures), best


def read_weights(folder: Path, adapter: TrainableAdapter) -> None:
    """Load the weights of a checkpoint into `adapter`, as to publish them; raise as `read_run` does."""
    weights = load_file(folder / WEIGHTS)
    parameters = adapter.parameters()
    if set(weights) != set(parameters) | set(adapter.constants()):
        raise _corrupt(folder.name, "its tensors are those of another adapter")
    load_weights(parameters, weights)
    adapter.load_constants(weights)


@torch.no_grad()
def load_weights(parameters: dict[str, torch.nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Give the parameters the values in `weights`; with EVA a layer's rank may differ between machines."""
    for name, parameter in parameters.items():
        parameter.data = weights[name].to(parameter.device, copy=True)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def _require(holds: bool, checkpoint_id: str, name: str) -> None:
    if not holds:
        raise _corrupt(checkpoint_id, f"{name} is not what was stored")


def _corrupt(checkpoint_id: str, text: str) -> DataLoss:
    return DataLoss("corrupt_checkpoint", f"checkpoint {checkpoint_id} cannot be used: {text}")


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
