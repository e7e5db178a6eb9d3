"""Typed settings, read once from the environment at the start of a process.

A service declares a frozen subclass with its own `env_prefix` and mixes in what it uses::

    class RegistrySettings(IndexSettings, StoreSettings, ServiceSettings):
        model_config = SettingsConfigDict(env_prefix="LORAFLEET_REGISTRY_")

and its `__main__` calls `load(RegistrySettings)`.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from services.common.tls import PeerTls, ServerTls

EXIT_BAD_CONFIGURATION = 2
SettingsT = TypeVar("SettingsT", bound="Settings")


class Address(NamedTuple):
    """A host and a TCP port; port 0 asks the system for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Parse `host:port` or `[ipv6]:port`; raise `ValueError` otherwise."""
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not host or not is_port or (":" in host and f"[{host}]" not in text):
        # The text itself stays out of the message: a secret set under the wrong name must not be shown.
        raise ValueError("must be HOST:PORT with a port from 0 to 65535")
    return Address(host, int(port))


def _checked_address(text: str) -> str:
    return str(parse_address(text))


def _checked_redis_url(url: SecretStr) -> SecretStr:
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        raise ValueError("must be redis://HOST:PORT/DB or rediss://HOST:PORT/DB")
    return url


def _checked_store_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError("must not hold credentials; set STORE_ACCESS_KEY and STORE_SECRET_KEY")
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return url
    if parts.scheme == "s3" and parts.netloc and parse_qs(parts.query).get("endpoint"):
        return url
    raise ValueError("must be file:///ABSOLUTE/FOLDER or s3://BUCKET?endpoint=http(s)://HOST:PORT")


def _none_when_empty(value: object) -> object:
    return None if value == "" else value


ListenAddress = Annotated[str, AfterValidator(_checked_address)]
RedisUrl = Annotated[SecretStr, AfterValidator(_checked_redis_url)]


class _Environment(EnvSettingsSource):
    """The environment, where a value that should be JSON and is not fails as a value of the wrong type does.

    The library's own source gives up at the first such value and hides what else is wrong.
    """

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class Settings(BaseSettings):
    """The rules for every settings class: frozen, nothing unknown, no NaN or infinity."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix="LORAFLEET_",
        hide_input_in_errors=True,
        # What comes from a variable without the prefix can still be given by its name to the constructor.
        populate_by_name=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, and nothing else."""
        return init_settings, _Environment(settings_cls)


class ServiceSettings(Settings):
    """What every gRPC service reads."""

    listen: ListenAddress = "127.0.0.1:0"
    """Address to serve on, `HOST:PORT`; port 0 takes a free one."""

    insecure_bind: bool = False
    """Allow `listen` on an address that other machines can reach, without mutual TLS: in plain text, or
    trusting every caller; and `metrics_listen` likewise."""

    tls_cert_file: Path | None = None
    """Certificate chain of this server, PEM; with it and its key the server speaks TLS only."""

    tls_key_file: Path | None = None
    """Private key of `tls_cert_file`, PEM, not encrypted."""

    tls_client_ca_file: Path | None = None
    """Authorities whose certificates clients must show (mutual TLS), PEM."""

    metrics_listen: ListenAddress | None = None
    """Address for Prometheus, `HOST:PORT`; no port is opened without it."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    grace_seconds: float = Field(default=20.0, ge=0, le=3600)
    """How long calls in flight may go on after SIGTERM."""

    unary_timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Longest a call with one answer may take, whatever the client asked for."""

    stream_timeout_seconds: float = Field(default=3600.0, gt=0, le=86400)
    """Longest a streaming call may take, whatever the client asked for."""

    port_file: Path | None = Field(default=None, validation_alias="LORAFLEET_PORT_FILE")
    """File that receives the bound `HOST:PORT` once the server listens."""

    otlp_endpoint: Annotated[str | None, BeforeValidator(_none_when_empty)] = Field(
        default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    """OTLP collector for traces and metrics, e.g. `http://127.0.0.1:4317`; nothing is exported without it. An
    empty value is none, as OpenTelemetry has it for its variables."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("TLS_CERT_FILE and TLS_KEY_FILE go together")
        if self.tls_client_ca_file is not None and self.tls_cert_file is None:
            raise ValueError("TLS_CLIENT_CA_FILE needs TLS_CERT_FILE and TLS_KEY_FILE")
        return self

    @property
    def address(self) -> Address:
        """`listen`, parsed."""
        return parse_address(self.listen)

    @property
    def metrics_address(self) -> Address | None:
        """`metrics_listen`, parsed."""
        return None if self.metrics_listen is None else parse_address(self.metrics_listen)

    @property
    def server_tls(self) -> ServerTls | None:
        """How this server speaks TLS; None for plain text."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return ServerTls(self.tls_cert_file, self.tls_key_file, self.tls_client_ca_file)


class PeerSettings(Settings):
    """For services that call other services."""

    peer_ca_file: Path | None = None
    """Authorities of the servers that are called, PEM; with it all calls to them go over TLS."""

    peer_cert_file: Path | None = None
    """Certificate chain to show to servers that ask for one, PEM."""

    peer_key_file: Path | None = None
    """Private key of `peer_cert_file`, PEM, not encrypted."""

    @model_validator(mode="after")
    def _check_peer_tls(self) -> Self:
        if (self.peer_cert_file is None) != (self.peer_key_file is None):
            raise ValueError("PEER_CERT_FILE and PEER_KEY_FILE go together")
        if self.peer_cert_file is not None and self.peer_ca_file is None:
            raise ValueError("PEER_CERT_FILE needs PEER_CA_FILE")
        return self

    @property
    def peer_tls(self) -> PeerTls | None:
        """How channels speak TLS; None for plain text."""
        if self.peer_ca_file is None:
            return None
        return PeerTls(self.peer_ca_file, self.peer_cert_file, self.peer_key_file)


class IndexSettings(Settings):
    """For services that use the Redis or Valkey index."""

    redis_url: RedisUrl


class StoreSettings(Settings):
    """For services that use the object store."""

    store_url: Annotated[str, AfterValidator(_checked_store_url)]
    """`file:///ABSOLUTE/FOLDER` or `s3://BUCKET?endpoint=http://HOST:PORT`."""

    store_access_key: SecretStr | None = None
    store_secret_key: SecretStr | None = None


class FileSettings(Settings):
    """For services that files pass through: one limit, so that none takes what another refuses."""

    max_file_bytes: int = Field(
        default=512 * 1024 * 1024, ge=1, le=64 * 1024**3, validation_alias="LORAFLEET_MAX_FILE_BYTES"
    )
    """Largest file: training data, batches and results."""


def load(settings_class: type[SettingsT]) -> SettingsT:
    """Return the settings from the environment.

    Prints one message that names every bad variable, never its value, and exits with
    `EXIT_BAD_CONFIGURATION` where the environment does not fit.
    """
    problems = [f"{name}: unknown variable" for name in _unknown_variables(settings_class)]
    try:
        settings = settings_class()
    except ValidationError as error:
        problems += [
            f"{_variable_name(settings_class, item['loc'])}: {item['msg']}" for item in error.errors()
        ]
    if problems:
        sys.stderr.write("bad configuration:\n" + "".join(f"  {line}\n" for line in problems))
        sys.exit(EXIT_BAD_CONFIGURATION)
    return settings


def _unknown_variables(settings_class: type[Settings]) -> list[str]:
    """Return the variables that bear our prefix and set nothing; pydantic-settings passes over them."""
    prefix = settings_class.model_config["env_prefix"].upper()
    known = {_variable_name(settings_class, (name,)).upper() for name in settings_class.model_fields}
    return sorted(
        name for name in os.environ if name.upper().startswith(prefix) and name.upper() not in known
    )


def _variable_name(settings_class: type[Settings], location: tuple[int | str, ...]) -> str:
    """Return the environment variable behind a field, given by its name or, in errors, by its alias."""
    if not location:
        # A rule about several variables, which its message names by what follows the prefix.
        return f"{settings_class.model_config['env_prefix']}*".upper()
    first = str(location[0])
    field = settings_class.model_fields.get(first)
    if field is None:
        return first
    if isinstance(field.validation_alias, str):
        return field.validation_alias
    return f"{settings_class.model_config['env_prefix']}{first}".upper()
