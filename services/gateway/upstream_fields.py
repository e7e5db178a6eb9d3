"""Upstream errors in the terms of the HTTP API: its field names, and one error for every absent model."""

from __future__ import annotations

from collections.abc import Mapping

from services.common.errors import FieldViolation, LorafleetError
from services.gateway.errors import model_not_found

_MODEL_REASONS = frozenset({"adapter_not_found", "version_not_found", "alias_not_found", "base_not_found"})
COMPLETION_FIELDS = {
    "model.adapter": "model",
    "adapter": "model",
    "ref": "model",
    "sampling.": "",
    "chat.messages": "messages",
    "chat": "messages",
    "text": "prompt",
    "tokens.token_ids": "prompt",
    "tokens": "prompt",
}
CHAT_FIELDS = {
    "sampling.json_schema": "response_format",
    "chat.tools": "tools",
    **COMPLETION_FIELDS,
    "prompt": "messages",
}
LORAX_FIELDS = {
    "model.adapter": "parameters.adapter_id",
    "sampling.max_tokens": "parameters.max_new_tokens",
    "sampling.json_schema": "parameters.response_format",
    "sampling.": "parameters.",
    "text": "inputs",
}


def in_http_terms(error: LorafleetError, fields: Mapping[str, str] = COMPLETION_FIELDS) -> LorafleetError:
    """Return the error with its fields renamed; a model that is absent becomes `model_not_found`.

    Args:
        error: what a service reported.
        fields: from the beginning of a service's field path to what stands in its place.
    """
    if error.reason in _MODEL_REASONS:
        return model_not_found()
    error.field = error.field and _renamed(error.field, fields)
    error.violations = tuple(
        FieldViolation(_renamed(violation.field, fields), violation.description, violation.reason)
        for violation in error.violations
    )
    return error


def _renamed(path: str, table: Mapping[str, str]) -> str:
    for beginning, replacement in table.items():
        if path == beginning or (
            path.startswith(beginning) and (beginning.endswith(".") or path[len(beginning)] in ".[")
        ):
            return replacement + path[len(beginning) :]
    return path
