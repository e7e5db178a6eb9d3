"""Which architectures can be served at all, before any weight is read."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from services.common.errors import Unimplemented


def check_architecture(path: Path) -> None:
    """Refuse the transformers folder `path` unless it is a causal language model of transformers whose
    attention can be replaced. A folder without a config.json is left to the loader.

    Raises:
        Unimplemented: `architecture_unsupported`.
    """
    if not (path / "config.json").is_file():
        return
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise _unsupported("This", "it is not an architecture that transformers has") from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:
        raise _unsupported(config.model_type, "it is not a causal language model")
    if not model_class._supports_attention_backend:
        raise _unsupported(config.model_type, "its attention cannot be replaced by one over paged KV")


def _unsupported(model_type: str, why: str) -> Unimplemented:
    message = f"{model_type} cannot be served: {why}."
    return Unimplemented("architecture_unsupported", message, field="base", value=model_type)
