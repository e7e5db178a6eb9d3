"""Settings from the environment: types, refusals, and messages that give no secret away."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from services.common.config import (
    Address,
    IndexSettings,
    ServiceSettings,
    StoreSettings,
    load,
    parse_address,
)


class ShelfSettings(IndexSettings, StoreSettings, ServiceSettings):
    """The settings of a service that uses everything."""

    model_config = SettingsConfigDict(env_prefix="LORAFLEET_SHELF_")

    width_cm: float = 80.0


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


def test_every_bad_variable_is_named_at_once_without_its_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "LORAFLEET_SHELF_REDIS_URL": "http://hunter2",
        "LORAFLEET_SHELF_STORE_URL": "s3://hunter2",
        "LORAFLEET_SHELF_LOG_LEVEL": "LOUD-hunter2",
        "LORAFLEET_SHELF_WIDTH_CM": "inf",
        "LORAFLEET_SHELF_GRACE_SECONDS": "-1",
        "LORAFLEET_SHELF_WIDHT_CM": "hunter2",
    }
    for name, value in bad.items():
        monkeypatch.setenv(name, value)
    message = refusal(capsys)
    lines = message.splitlines()
    assert lines[0] == "bad configuration:"
    assert sorted(line.strip().partition(":")[0] for line in lines[1:]) == sorted(bad)
    assert "hunter2" not in message


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
