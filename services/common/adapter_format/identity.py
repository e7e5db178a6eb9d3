"""The identity of an adapter version: what it computes, never what it is called."""

from __future__ import annotations

import hashlib

from services.common.adapter_format.strict_json import canonical_json


def version_digest(*, config_digest: str, weights_digest: str, base_digest: str) -> str:
    """Return `sha256:<hex>` over the digests of both files and of the base fingerprint.

    It keys every cache and every tier of memory, so two names of one version share them.
    """
    parts = {"base": base_digest, "config": config_digest, "weights": weights_digest}
    return "sha256:" + hashlib.sha256(canonical_json(parts)).hexdigest()
