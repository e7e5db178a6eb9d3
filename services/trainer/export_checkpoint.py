"""The child process that writes a checkpoint as an adapter: `python -m services.trainer.export_checkpoint`.

Started by `export_process` with the folder that holds the request, the checkpoint and the job's files, where
it is to be measured; it leaves the adapter and its answer there, and dies with the service.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from services.common import logs
from services.common.config import load
from services.common.errors import LorafleetError
from services.common.prompts import PromptEncoder
from services.trainer.config import TrainerSettings
from services.trainer.export_process import (
    ADAPTER,
    ANSWER,
    ANSWER_JSON,
    CHECKPOINT,
    REQUEST,
    REQUEST_JSON,
    ExportAnswer,
    Exported,
)
from services.trainer.failure import JobFailure
from services.trainer.parent import die_with_parent
from services.trainer.preparation import prepare_validated
from services.trainer.tokens import stop_token_id
from services.trainer.training.base import BaseFolder, SharedBase
from services.trainer.training.checkpoint import read_weights
from services.trainer.training.evaluate import evaluate
from services.trainer.training.export import export
from services.trainer.training.initialise import new_adapter
from services.trainer.training.model import AdapterModel
from services.trainer.training.probes import probe


def main() -> int:
    """Write the adapter and measure it; 0 where the answer was told."""
    die_with_parent()
    settings = load(TrainerSettings)
    logs.configure("trainer-export", settings.log_level)
    os.nice(settings.niceness)
    torch.set_num_threads(settings.torch_threads)
    disable_progress_bar()
    folder = Path(sys.argv[1])
    try:
        answer = ExportAnswer(_export(folder, settings))
    except LorafleetError as error:
        answer = ExportAnswer(failure=JobFailure.of(error))
    (folder / ANSWER).write_bytes(ANSWER_JSON.dump_json(answer))
    return 0


def _export(folder: Path, settings: TrainerSettings) -> Exported:
    asked = REQUEST_JSON.validate_json((folder / REQUEST).read_bytes())
    request = asked.job
    name = request.base_model
    base_folder = BaseFolder(name, settings.bases[name], settings.base_quantization)
    base = SharedBase.load(base_folder, torch.device(settings.device_type))
    # Its weights are those of the checkpoint at once; what it begins with gives the shapes.
    adapter = new_adapter(base, request.spec, seed=request.seed)
    read_weights(folder / CHECKPOINT, adapter)
    error = export(adapter, request.spec, folder / ADAPTER, name)
    if asked.dataset is None:
        return Exported(error)
    encoder = PromptEncoder.load(base_folder.path)
    data = prepare_validated(request, asked.dataset, folder, encoder, folder=folder / "tokens")
    model = AdapterModel(base, adapter, request.spec, stop_token_id(encoder))
    measured = evaluate(model, data.validation, encoder, request.spec, seed=request.seed, check=lambda: None)
    return Exported(error, measured.figures, measured.collapsed, probe(model, data.for_probes))


if __name__ == "__main__":
    sys.exit(main())
