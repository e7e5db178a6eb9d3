"""docker-compose.yml against the settings that the services really have."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lorafleet.fleet.config import FleetConfig, Ports
from lorafleet.fleet.services import environment
from lorafleet.fleet.state import StateFolder
from services.common.config import Settings, load
from services.gateway.config import GatewaySettings
from services.inference.settings import InferenceSettings
from services.registry.config import RegistrySettings
from services.trainer.config import TrainerSettings

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, type[Settings]] = {
    "registry": RegistrySettings,
    "trainer": TrainerSettings,
    "trainer-gpu": TrainerSettings,
    "inference": InferenceSettings,
    "inference-gpu": InferenceSettings,
    "gateway": GatewaySettings,
}
TOOLS = {"otel-collector", "jaeger", "prometheus", "grafana", "webui"}
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    loaded = YAML(typ="safe").load((ROOT / name).read_text())
    assert isinstance(loaded, dict)
    return loaded


def filled(text: str) -> str:
    """Fill in variables: defaults where there are some, and otherwise a secret."""
    return VARIABLE.sub(lambda match: match[3] if match[2] == "-" else "0123456789abcdef", text)


def environment_of(service: str) -> dict[str, str]:
    return {name: filled(value) for name, value in compose()["services"][service]["environment"].items()}


@pytest.mark.parametrize("service", SETTINGS)
def test_a_service_understands_its_environment(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(service).items():
        monkeypatch.setenv(name, value)
    settings = load(SETTINGS[service])
    assert getattr(settings, "insecure_bind", None) is True
    assert str(getattr(settings, "listen", "")).startswith("0.0.0.0:")
    # Nothing is exported unless a collector is named.
    assert getattr(settings, "otlp_endpoint", "") is None


@pytest.mark.parametrize("service", ["registry", "trainer", "inference", "gateway"])
def test_a_service_is_told_what_the_embedded_one_is_told(service: str, tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.create()
    ports = Ports(valkey=1, registry=2, trainer=3, inference=4, gateway=5)
    config = FleetConfig(base_name="b", base_path=tmp_path, ports=ports)
    embedded = {name for name in environment(service, config, state) if name.startswith("LORAFLEET_")}
    # How long a container may take to stop is compose's own word.
    assert embedded - {f"LORAFLEET_{service.upper()}_GRACE_SECONDS"} <= set(environment_of(service))


def test_every_variable_is_explained() -> None:
    used = {match[1] for match in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text())}
    named = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == named - {"COMPOSE_PROFILES"}


def test_only_the_gateway_is_reachable_and_only_from_this_machine() -> None:
    services = compose()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) - TOOLS == {"gateway"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert compose()["networks"]["inside"]["internal"] is True


def test_profiles_choose_one_engine_and_the_tools() -> None:
    services = compose()["services"]
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert [name for name, chosen in profiles.items() if not chosen] == [
        "redis",
        "minio",
        "registry",
        "gateway",
    ]
    for processor in ("cpu", "gpu"):
        assert sum(processor in chosen for chosen in profiles.values()) == 2
    for name in ("trainer", "inference"):
        # Others reach either under the same name.
        assert services[f"{name}-gpu"]["networks"]["inside"]["aliases"] == [name]
        assert services[f"{name}-gpu"]["environment"] == services[name]["environment"]
    assert {name for name, chosen in profiles.items() if chosen in (["observability"], ["webui"])} == TOOLS


def test_state_is_kept_in_named_volumes() -> None:
    volumes = compose()["volumes"]
    for name, service in compose()["services"].items():
        mounted = {volume.split(":")[0] for volume in service.get("volumes", []) if volume[0] not in ".$"}
        assert mounted <= set(volumes), name
        if "tmpfs" in service:
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name


def test_another_store_leaves_minio_out_and_lets_the_services_reach_it() -> None:
    override = compose("docker-compose.s3.yml")["services"]
    services = compose()["services"]
    assert override["minio"]["profiles"]
    assert services["registry"]["depends_on"]["minio"]["required"] is False
    using = {
        name
        for name, service in services.items()
        if any(variable.endswith("_STORE_URL") for variable in service.get("environment", {}))
    }
    assert using == set(override) - {"minio"}
    for name in using:
        assert "door" in override[name]["networks"], name
