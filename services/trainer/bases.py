"""The bases that this trainer can train on: their folders, shapes and fingerprints."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import NotFound
from services.common.fingerprint import (
    BaseFingerprint,
    Quantization,
    fingerprint_base,
    linear_module_table,
    num_parameters,
)
from services.common.names import base_name
from services.common.prompts import PromptEncoder


@dataclass(frozen=True, slots=True)
class TrainableBase:
    """One base.

    Attributes:
        modules: the linear layers that adapters may target: name -> (in_features, out_features).
        max_model_len: longest sequence in tokens.
        encoder: its tokenizer and chat template.
    """

    name: str
    path: Path
    fingerprint: BaseFingerprint
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_model_len: int
    num_parameters: int
    modules: Mapping[str, tuple[int, int]]
    encoder: PromptEncoder

    @classmethod
    def load(cls, name: str, path: Path, quantization: Quantization) -> TrainableBase:
        """Read a model folder; every weight is read once, for its digest.

        Raises:
            InvalidArgument, FailedPrecondition: what is wrong with the name or the folder.
        """
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return cls(
            name=base_name(name),
            path=path,
            fingerprint=fingerprint_base(path, quantization),
            architecture=str(config["architectures"][0]),
            hidden_size=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            vocab_size=int(config["vocab_size"]),
            max_model_len=int(config["max_position_embeddings"]),
            num_parameters=num_parameters(path),
            modules=linear_module_table(path),
            encoder=PromptEncoder.load(path),
        )


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
