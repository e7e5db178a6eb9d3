"""docker-compose.yml against the settings that the services really have."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from services.common.config import Settings, load
from services.gateway.config import GatewaySettings
from services.inference.settings import InferenceSettings
from services.registry.config import RegistrySettings
from services.trainer.config import TrainerSettings

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, type[Settings]] = {
    "registry": RegistrySettings,
    "trainer": TrainerSettings,
    "inference": InferenceSettings,
    "gateway": GatewaySettings,
}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose() -> dict[str, Any]:
    loaded = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def filled(text: str) -> str:
    """Fill in variables: defaults where there are some, and otherwise a secret."""
    return VARIABLE.sub(lambda match: match[3] if match[2] == "-" else "0123456789abcdef", text)


@pytest.mark.parametrize("service", SETTINGS)
def test_a_service_understands_its_environment(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in compose()["services"][service]["environment"].items():
        monkeypatch.setenv(name, filled(value))
    settings = load(SETTINGS[service])
    assert getattr(settings, "insecure_bind", None) is True
    assert str(getattr(settings, "listen", "")).startswith("0.0.0.0:")


def test_every_variable_is_explained() -> None:
    used = {match[1] for match in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text())}
    named = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == named


def test_only_the_gateway_is_reachable_and_only_from_this_machine() -> None:
    services = compose()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in published["gateway"])
    assert compose()["networks"]["inside"]["internal"] is True
