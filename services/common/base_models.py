"""Registering a base: what the registry keeps of a local model folder, sent until the registry takes it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from lorafleet.registry.v1 import base_model_pb2 as messages
from services.common import fingerprint, status
from services.common.adapter_format.strict_json import StrictJsonError, parse_object
from services.common.call_context import call_scope
from services.common.errors import Code, FailedPrecondition
from services.common.fingerprint import BaseFingerprint, QuantizationType

if TYPE_CHECKING:
    from lorafleet.registry.v1.base_model_pb2_grpc import BaseModelServiceAsyncStub

_logger = logging.getLogger("lorafleet.base_models")

# Bases belong to no tenant, and every call names one.
SYSTEM_TENANT = "system"
_FIRST_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 2.0
_CALL_TIMEOUT_SECONDS = 10.0
_JSON_DEPTH = 64
_RETRIED = frozenset({Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED})
_QUANTIZATIONS = {
    QuantizationType.NONE: messages.QUANTIZATION_TYPE_NONE,
    QuantizationType.NF4: messages.QUANTIZATION_TYPE_NF4,
    QuantizationType.FP4: messages.QUANTIZATION_TYPE_FP4,
}
# config.json's names for one thing, the usual one first.
_NAMES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
}


def base_model(name: str, model_dir: Path, values: BaseFingerprint) -> messages.BaseModel:
    """Return the registry's record of the model in `model_dir`; reads headers, not weights.

    Raises:
        FailedPrecondition: `bad_config` where config.json lacks what the record needs.
    """
    config = _config(model_dir)
    text_config = config.get("text_config", config)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise _bad_config("architectures")
    return messages.BaseModel(
        name=name,
        fingerprint=fingerprint_message(values),
        architecture=architectures[0],
        hidden_size=_number(text_config, "hidden_size"),
        num_layers=_number(text_config, "num_hidden_layers"),
        vocab_size=_number(text_config, "vocab_size"),
        max_model_len=_number(text_config, "max_position_embeddings"),
        num_parameters=fingerprint.num_parameters(model_dir),
        linear_modules=[
            messages.LinearModule(name=module, in_features=in_features, out_features=out_features)
            for module, (in_features, out_features) in fingerprint.linear_module_table(model_dir).items()
        ],
    )


def fingerprint_message(values: BaseFingerprint) -> messages.Fingerprint:
    """Return a fingerprint as a message."""
    return messages.Fingerprint(
        weights_digest=values.weights_digest,
        config_digest=values.config_digest,
        tokenizer_digest=values.tokenizer_digest,
        chat_template_digest=values.chat_template_digest,
        quantization=messages.Quantization(
            type=_QUANTIZATIONS[values.quantization.type],
            block_size=values.quantization.block_size,
            double_quantization=values.quantization.double_quantization,
            compute_dtype=values.quantization.compute_dtype.value,
        ),
        digest=values.digest,
    )


async def register_base(bases: BaseModelServiceAsyncStub, record: messages.BaseModel) -> messages.BaseModel:
    """Send a record to the registry, again and again while that cannot be reached; return what it keeps.

    Raises:
        LorafleetError: the registry refuses it, e.g. `base_exists` for a name that means other values.
    """
    pause_seconds = _FIRST_PAUSE_SECONDS
    request = messages.CreateBaseModelRequest(base_model=record)
    while True:
        try:
            with call_scope(tenant=SYSTEM_TENANT):
                return await bases.CreateBaseModel(request, timeout=_CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            refusal = status.from_rpc_error(error)
            if refusal.code not in _RETRIED:
                raise refusal from error
            _logger.info("the registry cannot be reached yet", extra={"detail": refusal.message})
        await asyncio.sleep(pause_seconds)
        pause_seconds = min(_MAX_PAUSE_SECONDS, pause_seconds * 2)


def _config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        raise FailedPrecondition("missing_file", f"{model_dir.name} holds no config.json.", field=path.name)
    try:
        return parse_object(path.read_bytes(), max_depth=_JSON_DEPTH)
    except StrictJsonError as error:
        raise FailedPrecondition("bad_config", f"config.json: {error}.", field=path.name) from error


def _number(config: dict[str, Any], name: str) -> int:
    for key in _NAMES[name]:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise _bad_config(name)


def _bad_config(name: str) -> FailedPrecondition:
    return FailedPrecondition("bad_config", f"config.json must hold {name}.", field=name)
