"""Which fleet a client means, and by which key."""

from __future__ import annotations

import os

from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.launch import API_KEY_SECRET
from lorafleet.fleet.state import StateFolder, default_root
from services.common.errors import FailedPrecondition

TARGET_VARIABLE = "LORAFLEET_GRPC_TARGET"
KEY_VARIABLE = "LORAFLEET_API_KEY"


def where(target: str | None, api_key: str | None) -> tuple[str, str]:
    """Return target and key: those given, else those of the environment, else those of this machine's fleet.

    Raises:
        FailedPrecondition: `no_fleet`.
    """
    target = target or os.environ.get(TARGET_VARIABLE)
    api_key = api_key or os.environ.get(KEY_VARIABLE)
    if target and api_key:
        return target, api_key
    state = StateFolder(default_root().expanduser().resolve())
    config, own_key = FleetConfig.load(state), state.read_secret(API_KEY_SECRET)
    if config is None or own_key is None:
        raise FailedPrecondition(
            "no_fleet",
            f"there is no fleet in {state.root}; start one with `lorafleet up`, or set {TARGET_VARIABLE} and "
            f"{KEY_VARIABLE}",
        )
    return target or config.grpc_target, api_key or own_key
