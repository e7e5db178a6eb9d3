"""Settings from the environment: types, refusals, and messages that give no secret away."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from services.common.config import (
    Address,
    IndexSettings,
    PeerSettings,
    ServiceSettings,
    Settings,
    StoreSettings,
    load,
    parse_address,
)
from services.common.tls import PeerTls, ServerTls
from services.gateway.config import GatewaySettings
from services.inference.settings import InferenceSettings
from services.registry.config import RegistrySettings
from services.trainer.config import TrainerSettings


class ShelfSettings(IndexSettings, StoreSettings, PeerSettings, ServiceSettings):
    """The settings of a service that uses everything."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_SHELF_")

    width_cm: float = 80.0
    labels: dict[str, int] = Field(default_factory=dict)


@pytest.fixture(autouse=True)
def shelf_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_SHELF_REDIS_URL", "redis://:hunter2@127.0.0.1:6379/0")
    monkeypatch.setenv("LORAFLEET_SHELF_STORE_URL", "file:///var/lib/lorafleet")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("LORAFLEET_PORT_FILE", raising=False)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        load(ShelfSettings)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_values_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_SHELF_LISTEN", "[::1]:7000")
    monkeypatch.setenv("LORAFLEET_SHELF_WIDTH_CM", "12.5")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("LORAFLEET_PORT_FILE", "/run/port")
    monkeypatch.setenv("LORAFLEET_OTHER_THING", "not ours")
    settings = load(ShelfSettings)
    assert settings.address == Address("::1", 7000)
    assert settings.width_cm == 12.5
    assert settings.otlp_endpoint == "http://127.0.0.1:4317"
    assert settings.port_file == Path("/run/port")
    assert settings.redis_url.get_secret_value() == "redis://:hunter2@127.0.0.1:6379/0"
    assert "hunter2" not in repr(settings)
    with pytest.raises(ValidationError, match="frozen"):
        settings.width_cm = 1.0


def test_row_146_every_bad_variable_is_named_at_once_without_its_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "LORAFLEET_SHELF_REDIS_URL": "http://hunter2",
        "LORAFLEET_SHELF_STORE_URL": "s3://hunter2",
        "LORAFLEET_SHELF_LOG_LEVEL": "LOUD-hunter2",
        "LORAFLEET_SHELF_WIDTH_CM": "inf",
        "LORAFLEET_SHELF_GRACE_SECONDS": "-1",
        "LORAFLEET_SHELF_WIDHT_CM": "hunter2",
        "LORAFLEET_SHELF_LABELS": '{"hunter2": ',
        "LORAFLEET_SHELF_LISTEN": "hunter2",
        "LORAFLEET_SHELF_INSECURE_BIND": "hunter2",
    }
    for name, value in bad.items():
        monkeypatch.setenv(name, value)
    message = refusal(capsys)
    lines = message.splitlines()
    assert lines[0] == "bad configuration:"
    assert sorted(line.strip().partition(":")[0] for line in lines[1:]) == sorted(bad)
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WIDTH_CM", "valid number"),
        ("INSECURE_BIND", "valid boolean"),
        ("LABELS", "valid dictionary"),
        ("LISTEN", "HOST:PORT"),
        ("METRICS_LISTEN", "HOST:PORT"),
        ("LOG_LEVEL", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("REDIS_URL", "redis://HOST:PORT/DB"),
        ("STORE_URL", "file:///ABSOLUTE/FOLDER"),
    ],
)
def test_row_146_a_value_of_the_wrong_type_is_told_what_was_expected(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"LORAFLEET_SHELF_{name}", "hunter2")
    message = refusal(capsys)
    assert f"LORAFLEET_SHELF_{name}: " in message
    assert expected in message
    assert "hunter2" not in message


EVERY_VARIABLE = sorted(
    {
        (settings_class, name)
        for settings_class in (RegistrySettings, TrainerSettings, InferenceSettings, GatewaySettings)
        for name, field in settings_class.model_fields.items()
        if field.validation_alias is None
    },
    key=lambda item: (item[0].__name__, item[1]),
)


@pytest.mark.parametrize(
    ("settings_class", "name"), EVERY_VARIABLE, ids=[f"146 {c.__name__}.{n}" for c, n in EVERY_VARIABLE]
)
def test_row_146_a_secret_in_the_wrong_place_is_not_shown(
    settings_class: type[Settings],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = settings_class.model_config["env_prefix"]
    monkeypatch.setenv(f"{prefix}{name}".upper(), "hunter2\n://hunter2@hunter2:hunter2")
    # Another variable is wrong for certain, so that there is a message.
    monkeypatch.setenv(f"{prefix}GRACE_SECONDS", "hunter2")
    with pytest.raises(SystemExit):
        load(settings_class)
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"TLS_CERT_FILE": "/c"}, "TLS_CERT_FILE and TLS_KEY_FILE go together"),
        ({"TLS_KEY_FILE": "/k"}, "TLS_CERT_FILE and TLS_KEY_FILE go together"),
        ({"TLS_CLIENT_CA_FILE": "/a"}, "TLS_CLIENT_CA_FILE needs TLS_CERT_FILE"),
        ({"PEER_CERT_FILE": "/c"}, "PEER_CERT_FILE and PEER_KEY_FILE go together"),
        ({"PEER_CERT_FILE": "/c", "PEER_KEY_FILE": "/k"}, "PEER_CERT_FILE needs PEER_CA_FILE"),
    ],
)
def test_half_a_tls_configuration_is_refused(
    given: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"LORAFLEET_SHELF_{name}", value)
    message = refusal(capsys)
    assert "LORAFLEET_SHELF_*: " in message
    assert named in message


def test_tls_files_become_server_and_peer_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(ShelfSettings).server_tls is None
    assert load(ShelfSettings).peer_tls is None
    files = {
        f"{group}_{kind}_FILE": f"/{group}/{kind}"
        for group, kinds in (("TLS", ("CERT", "KEY", "CLIENT_CA")), ("PEER", ("CERT", "KEY", "CA")))
        for kind in kinds
    }
    for name, value in files.items():
        monkeypatch.setenv(f"LORAFLEET_SHELF_{name}", value)
    settings = load(ShelfSettings)
    assert settings.server_tls == ServerTls(Path("/TLS/CERT"), Path("/TLS/KEY"), Path("/TLS/CLIENT_CA"))
    assert settings.peer_tls == PeerTls(Path("/PEER/CA"), Path("/PEER/CERT"), Path("/PEER/KEY"))


def test_a_missing_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LORAFLEET_SHELF_REDIS_URL")
    assert "LORAFLEET_SHELF_REDIS_URL: Field required" in refusal(capsys)


def test_names_with_an_alias_do_not_answer_to_the_prefix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAFLEET_SHELF_PORT_FILE", "/run/port")
    assert "LORAFLEET_SHELF_PORT_FILE: unknown variable" in refusal(capsys)


@pytest.mark.parametrize(
    "url",
    [
        "file://relative/path",
        "file:relative",
        "/var/lib",
        "s3://bucket",
        "s3://key:secret@bucket?endpoint=http://h",
        "s3:///x?endpoint=h",
    ],
)
def test_store_urls_that_would_not_work_are_refused(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAFLEET_SHELF_STORE_URL", url)
    assert "LORAFLEET_SHELF_STORE_URL" in refusal(capsys)


@pytest.mark.parametrize(
    "text", ["", "7000", ":7000", "host", "host:", "host:65536", "host:-1", "::1:70", "h:٣"]
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "is_loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.0.2.1:1", False),
        ("example.org:1", False),
    ],
)
def test_loopback(text: str, is_loopback: bool) -> None:
    address = parse_address(text)
    assert address.is_loopback is is_loopback
    assert str(address) == text
