"""The bases that this trainer can train on: their folders, shapes and fingerprints."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorafleet.registry.v1.base_model_pb2 import BaseModel
from services.common.base_models import base_model
from services.common.errors import NotFound
from services.common.fingerprint import BaseFingerprint, Quantization, fingerprint_base
from services.common.names import base_name
from services.common.prompts import PromptEncoder


@dataclass(frozen=True, slots=True)
class TrainableBase:
    """One base.

    Attributes:
        modules: the linear layers that adapters may target: name -> (in_features, out_features).
        record: what the registry keeps of it.
        encoder: its tokenizer and chat template.
    """

    name: str
    path: Path
    fingerprint: BaseFingerprint
    record: BaseModel
    modules: Mapping[str, tuple[int, int]]
    encoder: PromptEncoder

    @classmethod
    def load(cls, name: str, path: Path, quantization: Quantization) -> TrainableBase:
        """Read a model folder; every weight is read once, for its digest.

        Raises:
            InvalidArgument, FailedPrecondition: what is wrong with the name or the folder.
        """
        fingerprint = fingerprint_base(path, quantization)
        record = base_model(base_name(name), path, fingerprint)
        modules = {module.name: (module.in_features, module.out_features) for module in record.linear_modules}
        return cls(name, path, fingerprint, record, modules, PromptEncoder.load(path))


class BaseCatalog:
    """The bases by name, once they are loaded and the registry knows them."""

    def __init__(self) -> None:
        self._bases: dict[str, TrainableBase] = {}

    async def load(self, folders: Mapping[str, Path], quantization: Quantization) -> list[TrainableBase]:
        """Load the bases in `folders`, which are by name, and return them."""
        for name, path in folders.items():
            self._bases[name] = await asyncio.to_thread(TrainableBase.load, name, path, quantization)
        return list(self._bases.values())

    def find(self, name: str) -> TrainableBase:
        """Return the base called `name`; raise `NotFound` (`base_not_found`) where there is none."""
        base = self._bases.get(name)
        if base is None:
            raise NotFound(
                "base_not_found",
                "this trainer has no base of that name",
                field="base_model",
                value=name,
                limit=", ".join(self._bases),
            )
        return base
