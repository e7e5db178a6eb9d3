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
from typing import Annotated, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

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
        raise ValueError(f"must be HOST:PORT with a port from 0 to 65535, not {text!r}")
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


ListenAddress = Annotated[str, AfterValidator(_checked_address)]


class Settings(BaseSettings):
    """The rules for every settings class: frozen, nothing unknown, no NaN or infinity."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, env_prefix="LORAFLEET_", hide_input_in_errors=True
    )


class ServiceSettings(Settings):
    """What every gRPC service reads."""

    listen: ListenAddress = "127.0.0.1:0"
    """Address to serve on, `HOST:PORT`; port 0 takes a free one."""

    insecure_bind: bool = False
    """Allow `listen` on an address that other machines can reach, in plain text, unauthenticated."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    grace_seconds: float = Field(default=20.0, ge=0, le=3600)
    """How long calls in flight may go on after SIGTERM."""

    unary_timeout_seconds: float = Field(default=60.0, gt=0, le=3600)
    """Longest a call with one answer may take, whatever the client asked for."""

    stream_timeout_seconds: float = Field(default=3600.0, gt=0, le=86400)
    """Longest a streaming call may take, whatever the client asked for."""

    port_file: Path | None = Field(default=None, validation_alias="LORAFLEET_PORT_FILE")
    """File that receives the bound `HOST:PORT` once the server listens."""

    otlp_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    """OTLP collector for traces, e.g. `http://127.0.0.1:4317`; no traces are exported without it."""

    @property
    def address(self) -> Address:
        """`listen`, parsed."""
        return parse_address(self.listen)


class IndexSettings(Settings):
    """For services that use the Redis or Valkey index."""

    redis_url: Annotated[SecretStr, AfterValidator(_checked_redis_url)]


class StoreSettings(Settings):
    """For services that use the object store."""

    store_url: Annotated[str, AfterValidator(_checked_store_url)]
    """`file:///ABSOLUTE/FOLDER` or `s3://BUCKET?endpoint=http://HOST:PORT`."""

    store_access_key: SecretStr | None = None
    store_secret_key: SecretStr | None = None


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
    except SettingsError as error:
        problems.append(str(error))
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
    first = str(location[0]) if location else ""
    field = settings_class.model_fields.get(first)
    if field is None:
        return first or settings_class.__name__
    if isinstance(field.validation_alias, str):
        return field.validation_alias
    return f"{settings_class.model_config['env_prefix']}{first}".upper()
