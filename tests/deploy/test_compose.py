"""The compose file against the settings that services really have, and against `.env.example`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from services.common.config import Settings
from services.gateway.config import GatewaySettings
from services.inference.settings import InferenceSettings
from services.registry.config import RegistrySettings
from services.trainer.config import TrainerSettings

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, type[Settings]] = {
    "registry": RegistrySettings,
    "trainer": TrainerSettings,
    "inference": InferenceSettings,
    "gateway": GatewaySettings,
}
COMPOSE = ROOT / "docker-compose.yml"


def services() -> dict[str, dict[str, Any]]:
    loaded = YAML(typ="safe").load(COMPOSE.read_text())
    found = loaded["services"]
    assert isinstance(found, dict)
    return found


def ours() -> dict[str, dict[str, Any]]:
    return {name: service for name, service in services().items() if "PROBE_TARGET" in environment(service)}


def environment(service: dict[str, Any]) -> dict[str, str]:
    found = service.get("environment", {})
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", sorted(ours()))
def test_a_container_sets_what_its_service_reads(name: str) -> None:
    service = name.removesuffix("-gpu")
    prefix = f"LORAFLEET_{service.upper()}_"
    fields = {field.upper() for field in SETTINGS[service].model_fields}
    named = {variable for variable in environment(ours()[name]) if variable.startswith("LORAFLEET_")}
    assert named
    assert {variable.removeprefix(prefix) for variable in named} <= fields


def test_every_service_has_a_container() -> None:
    assert {name.removesuffix("-gpu") for name in ours()} == set(SETTINGS)


def test_a_health_check_asks_the_port_that_the_service_opens() -> None:
    for name, service in ours().items():
        variables = environment(service)
        listen = variables[f"LORAFLEET_{name.removesuffix('-gpu').upper()}_LISTEN"]
        assert f":{listen.rpartition(':')[2]}" in variables["PROBE_TARGET"]


def test_what_an_operator_may_set_is_in_the_example() -> None:
    example = set(re.findall(r"^#? ?([A-Z][A-Z_]*)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    asked = set(re.findall(r"\$\{([A-Z_]+)", COMPOSE.read_text()))
    assert asked <= example
    # What no service asks for is for compose itself.
    assert example - asked == {"COMPOSE_PROFILES"}


def test_only_doors_are_open_and_only_on_this_machine() -> None:
    for name, service in services().items():
        for port in service.get("ports", []):
            assert str(port).startswith("127.0.0.1:"), name
        if service.get("ports"):
            assert "door" in service["networks"], name


@pytest.mark.parametrize("name", sorted(ours()))
def test_a_container_has_no_more_rights_than_it_needs(name: str) -> None:
    service = ours()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
