"""`fleet.json`: what a fleet was last started with, so that the next start needs no arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import lorafleet
from lorafleet.fleet import ports
from lorafleet.fleet.errors import FleetError
from lorafleet.fleet.state import StateFolder, write_private
from services.common.errors import InvalidArgument
from services.common.names import base_name

BUNDLED_BASE_NAME = "lorafleet-5m"
_DEFAULT_PORTS = {
    "valkey": 7100,
    "registry": 7101,
    "trainer": 7102,
    "inference": 7103,
    "gateway": 8000,
    "grpc": 8001,
}

Quantization = Literal["nf4", "none"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


class Ports(BaseModel):
    """The loopback ports of a fleet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    valkey: int = Field(ge=1, le=65535)
    registry: int = Field(ge=1, le=65535)
    trainer: int = Field(ge=1, le=65535)
    inference: int = Field(ge=1, le=65535)
    gateway: int = Field(ge=1, le=65535)
    grpc: int = Field(default=_DEFAULT_PORTS["grpc"], ge=1, le=65535)


class FleetConfig(BaseModel):
    """One fleet's base model, its numbers and its ports."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_name: str
    base_path: Path
    quantization: Quantization = "nf4"
    compute_dtype: ComputeDtype = "auto"
    ports: Ports

    @property
    def url(self) -> str:
        """Where the HTTP door is, without a path."""
        return f"http://{ports.HOST}:{self.ports.gateway}"

    @property
    def grpc_target(self) -> str:
        """Where gRPC clients are served, `HOST:PORT`."""
        return f"{ports.HOST}:{self.ports.grpc}"

    @classmethod
    def load(cls, state: StateFolder) -> Self | None:
        """Return what `state` records, or None before the first start.

        Raises:
            FleetError: the file was damaged or written by another release.
        """
        try:
            return cls.model_validate_json(state.config_file.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise FleetError(f"{state.config_file} cannot be read: {error}") from error

    def save(self, state: StateFolder) -> None:
        """Record this configuration in `state`."""
        write_private(state.config_file, self.model_dump_json(indent=2) + "\n")


class Wishes(BaseModel):
    """What `lorafleet up` was told; None keeps what was recorded, or takes the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_path: Path | None = None
    base_name: str | None = None
    quantization: Quantization | None = None
    compute_dtype: ComputeDtype | None = None
    port: int | None = None


def settle(recorded: FleetConfig | None, wishes: Wishes) -> FleetConfig:
    """Return the configuration to start with: wishes, then what was recorded, then the defaults.

    Internal ports move up to the next free one. The public port does so only at the very first start: after
    that, clients know it.

    Raises:
        FleetError: the base is no model folder, or the public port is in use.
    """
    base_path = wishes.base_path or (recorded.base_path if recorded else bundled_base())
    wanted_name = wishes.base_name or _default_name(base_path, recorded)
    if not (base_path / "config.json").is_file():
        raise FleetError(f"{base_path} is no model folder: it has no config.json; name one with --base PATH")
    try:
        name = base_name(wanted_name)
    except InvalidArgument as error:
        raise FleetError(f"{error.message}, not {wanted_name!r}; choose one with --base-name") from error
    return FleetConfig(
        base_name=name,
        base_path=base_path.resolve(),
        quantization=wishes.quantization or (recorded.quantization if recorded else "nf4"),
        compute_dtype=wishes.compute_dtype or (recorded.compute_dtype if recorded else "auto"),
        ports=_settle_ports(recorded.ports if recorded else None, wishes.port),
    )


def bundled_base() -> Path:
    """Return the folder of the base model that comes with Lorafleet."""
    return Path(lorafleet.__file__).parents[1] / "assets" / "base"


def _default_name(base_path: Path, recorded: FleetConfig | None) -> str:
    if recorded and base_path.resolve() == recorded.base_path:
        return recorded.base_name
    if base_path.resolve() == bundled_base().resolve():
        return BUNDLED_BASE_NAME
    return base_path.resolve().name.lower()


def _settle_ports(recorded: Ports | None, public: int | None) -> Ports:
    wanted = recorded.model_dump() if recorded else dict(_DEFAULT_PORTS)
    gateway = public or wanted.pop("gateway")
    wanted.pop("gateway", None)
    if (public or recorded) and not ports.is_free(gateway):
        raise FleetError(f"port {gateway} is in use by another program; choose another with --port NUMBER")
    chosen = {"gateway": ports.next_free(gateway)}
    for name, port in wanted.items():
        chosen[name] = ports.next_free(port, taken=chosen.values())
    return Ports(**chosen)
