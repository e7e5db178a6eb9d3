"""Model names of the HTTP API, read as the base or as an adapter reference.

    BASE                      the served base itself
    name                      an adapter's newest version
    name:3                    its version 3
    name@prod                 the version its alias `prod` points to
    name@sha256:<hex>         the version with that digest
    BASE:<any of the above>   the same, naming the base it must belong to
    ft:BASE:TENANT:name:v3    what a fine-tuning job returns

A name that equals the served base, alone or in front of a colon, always means that base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorafleet.inference.v1.generation_pb2 import ModelRef
from services.common.errors import InvalidArgument
from services.common.names import AdapterRef
from services.gateway.errors import model_not_found

_FINE_TUNED = re.compile(r"ft:([^:]+):([^:]+):([^:]+):v([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model as the caller named it; `adapter` is None for the base."""

    text: str
    adapter: AdapterRef | None

    def reference(self) -> ModelRef:
        """Return the reference for inference."""
        return ModelRef(base=True) if self.adapter is None else ModelRef(adapter=str(self.adapter))


def parse_model_name(text: str | None, *, base: str, tenant: str) -> ModelName:
    """Read a model name for a tenant, where `base` is served.

    Raises:
        NotFound: `model_not_found`, whatever is wrong with the name: nothing else is told, and the base never
            answers in its place.
    """
    if text is None:
        raise model_not_found()
    if text == base:
        return ModelName(text, None)
    reference = text.removeprefix(f"{base}:")
    if text.startswith("ft:"):
        match = _FINE_TUNED.fullmatch(text)
        if match is None or match[1] != base or match[2] != tenant:
            raise model_not_found()
        reference = f"{match[3]}:{match[4]}"
    try:
        return ModelName(text, AdapterRef.parse(reference, field="model"))
    except InvalidArgument as error:
        raise model_not_found() from error
