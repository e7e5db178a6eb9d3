"""The processes of a whole fleet: which, in what order, with what environment."""

from __future__ import annotations

import json
import os
import sys

from lorafleet.fleet import ports
from lorafleet.fleet.config import FleetConfig
from lorafleet.fleet.logfile import LogPump
from lorafleet.fleet.processes import Child, Door, ServiceProcess, ValkeyProcess
from lorafleet.fleet.state import StateFolder

SERVICES = ("registry", "inference", "trainer", "gateway")
PEPPER_SECRET = "key_pepper"  # noqa: S105 - the name of a file
GATEWAY_LISTEN_FD = "LORAFLEET_GATEWAY_LISTEN_FD"
_GRACE_SECONDS = 10
_DEFAULTS = {
    # Progress bars of libraries have no place in a log.
    "TQDM_DISABLE": "1",
    # Training and serving share the cores: a thread that waits by spinning would hold up the other process.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def children(config: FleetConfig, state: StateFolder, pump: LogPump) -> list[Child]:
    """Return the fleet in the order of its start; any other order would do, some would be slower."""
    services = [
        ServiceProcess(
            name,
            [sys.executable, "-m", f"services.{name}"],
            environment(name, config, state),
            state.log_file(name),
            pump,
            door=Door(config.ports.gateway, GATEWAY_LISTEN_FD) if name == "gateway" else None,
        )
        for name in SERVICES
    ]
    return [ValkeyProcess(state.valkey, config.ports.valkey), *services]


def environment(service: str, config: FleetConfig, state: StateFolder) -> dict[str, str]:
    """Return the whole environment of one service; settings of ours that the caller's holds do not pass."""
    own = {"listen": _address(getattr(config.ports, service)), "grace_seconds": str(_GRACE_SECONDS)}
    own |= _settings(service, config, state)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LORAFLEET_")}
    prefix = f"LORAFLEET_{service.upper()}_"
    return _DEFAULTS | inherited | {prefix + name.upper(): value for name, value in own.items()}


def _settings(service: str, config: FleetConfig, state: StateFolder) -> dict[str, str]:
    index = {"redis_url": f"redis://{_address(config.ports.valkey)}/0"}
    store = {"store_url": state.store.as_uri()}
    registry = {"registry_target": _address(config.ports.registry)}
    match service:
        case "registry":
            return index | store
        case "trainer":
            own = {
                "bases": json.dumps({config.base_name: str(config.base_path)}),
                "quantization": config.quantization,
                "compute_dtype": config.compute_dtype,
                "inference_target": _address(config.ports.inference),
            }
            return index | store | registry | own
        case "inference":
            return (
                index
                | registry
                | {
                    "base_name": config.base_name,
                    "base_path": str(config.base_path),
                    "quantization": config.quantization,
                    "compute_dtype": config.compute_dtype,
                    "adapter_cache_path": str(state.cache / "adapters"),
                }
            )
        case "gateway":
            return (
                index
                | store
                | registry
                | {
                    "trainer_target": _address(config.ports.trainer),
                    "inference_target": _address(config.ports.inference),
                    "grpc_listen": config.grpc_target,
                    "key_pepper": state.secret(PEPPER_SECRET),
                }
            )
        case _:
            raise AssertionError(f"no service {service}")


def _address(port: int) -> str:
    return f"{ports.HOST}:{port}"
