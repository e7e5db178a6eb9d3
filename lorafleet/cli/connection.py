"""Which fleet a command talks to."""

from __future__ import annotations

import os
from pathlib import Path

from lorafleet.api import Api
from lorafleet.client import Client
from lorafleet.client.target import TARGET_VARIABLE
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
    """Return a connection to the HTTP door; see `coordinates`."""
    return Api(*coordinates(path))


def coordinates(path: Path | None) -> tuple[str, str]:
    """Return `$LORAFLEET_URL` and `$LORAFLEET_API_KEY`, else base URL and key of the fleet of a state folder.

    Raises:
        FleetError: neither names a fleet.
    """
    url = os.environ.get(_URL_VARIABLE)
    if url and path is None:
        key = os.environ.get(_KEY_VARIABLE)
        if not key:
            raise FleetError(f"{_URL_VARIABLE} is set, and {_KEY_VARIABLE} is not")
        return url, key
    config, api_key = _local(path)
    return f"{config.url}/v1", api_key


def connect_rpc(path: Path | None) -> Client:
    """Return a connection to `$LORAFLEET_GRPC_TARGET`, else to the gRPC door of the fleet of a state folder.

    Raises:
        FleetError: neither names a fleet.
    """
    target, key = os.environ.get(TARGET_VARIABLE), os.environ.get(_KEY_VARIABLE)
    if target and path is None:
        if not key:
            raise FleetError(f"{TARGET_VARIABLE} is set, and {_KEY_VARIABLE} is not")
        return Client(target, key)
    config, api_key = _local(path)
    return Client(config.grpc_target, api_key)


def _local(path: Path | None) -> tuple[FleetConfig, str]:
    state = state_folder(path)
    config, api_key = FleetConfig.load(state), state.read_secret(API_KEY_SECRET)
    if config is None or api_key is None:
        raise FleetError(f"there is no fleet in {state.root}; start one with `lorafleet up`")
    return config, api_key
