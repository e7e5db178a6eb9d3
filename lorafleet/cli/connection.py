"""Which fleet a command talks to."""

from __future__ import annotations

import os
from pathlib import Path

from lorafleet.api import Api
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.errors import FleetError
from lorafleet.fleet.launch import API_KEY_SECRET
from lorafleet.fleet.state import StateFolder, default_root

_URL_VARIABLE = "LORAFLEET_URL"
_KEY_VARIABLE = "LORAFLEET_API_KEY"


def state_folder(path: Path | None) -> StateFolder:
    """Return the state folder that `--state` names, or the default one."""
    return StateFolder((path or default_root()).expanduser().resolve())


def connect(path: Path | None) -> Api:
    """Return a connection to `$LORAFLEET_URL` with `$LORAFLEET_API_KEY`, else to the fleet of a state folder.

    Raises:
        FleetError: neither names a fleet.
    """
    url = os.environ.get(_URL_VARIABLE)
    if url and path is None:
        key = os.environ.get(_KEY_VARIABLE)
        if not key:
            raise FleetError(f"{_URL_VARIABLE} is set, and {_KEY_VARIABLE} is not")
        return Api(url, key)
    state = state_folder(path)
    config, api_key = FleetConfig.load(state), state.read_secret(API_KEY_SECRET)
    if config is None or api_key is None:
        raise FleetError(f"there is no fleet in {state.root}; start one with `lorafleet up`")
    return Api(f"{config.url}/v1", api_key)
