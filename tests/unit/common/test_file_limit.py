"""One limit on the size of files, for every service that they pass through."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from services.common.config import FileSettings, load
from services.gateway.config import GatewaySettings
from services.registry.config import RegistrySettings
from services.trainer.config import TrainerSettings

SERVICES: tuple[type[FileSettings], ...] = (GatewaySettings, RegistrySettings, TrainerSettings)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix in ("GATEWAY", "REGISTRY", "TRAINER"):
        monkeypatch.setenv(f"LORAFLEET_{prefix}_STORE_URL", "file:///var/lib/lorafleet")
        monkeypatch.setenv(f"LORAFLEET_{prefix}_REDIS_URL", "redis://127.0.0.1:6379/0")
        monkeypatch.setenv(f"LORAFLEET_{prefix}_REGISTRY_TARGET", "127.0.0.1:7101")
    monkeypatch.delenv("LORAFLEET_REGISTRY_REGISTRY_TARGET")
    monkeypatch.setenv("LORAFLEET_GATEWAY_KEY_PEPPER", "a pepper of 16 characters or more")
    monkeypatch.setenv("LORAFLEET_TRAINER_BASES", '{"base": "/models/base"}')
    monkeypatch.delenv("LORAFLEET_MAX_FILE_BYTES", raising=False)


@pytest.mark.parametrize("service", SERVICES)
def test_one_variable_sets_it_everywhere(
    service: type[FileSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(service).max_file_bytes == FileSettings().max_file_bytes
    monkeypatch.setenv("LORAFLEET_MAX_FILE_BYTES", "2000000000")
    assert load(service).max_file_bytes == 2_000_000_000
    monkeypatch.setenv("LORAFLEET_MAX_FILE_BYTES", "0")
    with pytest.raises(SystemExit):
        load(service)
    assert "LORAFLEET_MAX_FILE_BYTES: " in capsys.readouterr().err


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_has_one_of_its_own(
    service: type[FileSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{service.model_config['env_prefix']}MAX_FILE_BYTES"
    monkeypatch.setenv(name, "1000")
    with pytest.raises(SystemExit):
        load(service)
    assert f"{name}: unknown variable" in capsys.readouterr().err


def test_the_limit_has_bounds() -> None:
    with pytest.raises(ValidationError):
        FileSettings(max_file_bytes=65 * 1024**3)
