"""The chart against the settings that services really have, and what it renders where Helm is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
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
CHART = ROOT / "deploy" / "helm" / "lorafleet"
TEMPLATES = {path.name: path.read_text() for path in sorted((CHART / "templates").iterdir())}
SETTINGS: dict[str, type[Settings]] = {
    "registry": RegistrySettings,
    "trainer": TrainerSettings,
    "inference": InferenceSettings,
    "gateway": GatewaySettings,
}
PORTS = {
    "registry": {7101, 9464},
    "trainer": {7102, 9464},
    "inference": {7103, 9464},
    "gateway": {8000, 8001, 9464},
}
VALUES = {
    "existingSecret": "made-before",
    "storeUrl": "s3://bucket?endpoint=https://s3.example.org",
    "base.existingClaim": "models",
    "gateway.ingress.enabled": "true",
    "gateway.ingress.host": "api.example.org",
    "gateway.ingress.tlsSecret": "certificate",
    "inference.autoscaling.enabled": "true",
    "serviceMonitor.enabled": "true",
}


def values() -> dict[str, Any]:
    loaded = YAML(typ="safe").load((CHART / "values.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def variables(service: str) -> set[str]:
    """Return the variables that a service's template sets, those of the helpers included."""
    prefix = f"LORAFLEET_{service.upper()}_"
    text = TEMPLATES[f"{service}.yaml"]
    named = set(re.findall(rf"\b{prefix}[A-Z_]*[A-Z]\b", text))
    for helper in ("commonEnv", "storeEnv"):
        if f'include "lorafleet.{helper}"' in text:
            (body,) = re.findall(
                rf'define "lorafleet.{helper}" -}}}}(.*?){{{{- end -}}}}',
                TEMPLATES["_helpers.tpl"],
                re.DOTALL,
            )
            suffixes = re.findall(r"\.prefix }}([A-Z_]+)", body) + re.findall(r'"%s([A-Z_]+)" \.prefix', body)
            named |= {prefix + suffix for suffix in suffixes}
    return named


@pytest.mark.parametrize("service", SETTINGS)
def test_a_service_is_told_only_what_it_understands_and_all_that_compose_tells_it(service: str) -> None:
    prefix = f"LORAFLEET_{service.upper()}_"
    known = {prefix + name.upper() for name in SETTINGS[service].model_fields}
    assert variables(service) <= known
    compose = YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())["services"][service]
    assert {name for name in compose["environment"] if name.startswith(prefix)} <= variables(service)


@pytest.mark.parametrize("service", PORTS)
def test_ports_are_those_that_the_service_opens(service: str) -> None:
    text = TEMPLATES[f"{service}.yaml"]
    assert {int(port) for port in re.findall(r"containerPort: (\d+)", text)} == PORTS[service]
    probe = re.search(r'include "lorafleet.grpcProbes" (\d+)', text)
    if service == "gateway":
        assert {"/health", "/readyz"} == set(re.findall(r"httpGet: {path: (\S+),", text))
    else:
        assert probe is not None
        assert int(probe[1]) in PORTS[service]


def test_templates_use_only_values_that_there_are() -> None:
    used = {path for text in TEMPLATES.values() for path in re.findall(r"\.Values\.([\w.]+)", text)}
    assert used
    for path in used:
        found: Any = values()
        for part in path.split("."):
            assert part in found, path
            found = found[part]


def test_the_autoscaler_watches_a_metric_that_is_exported() -> None:
    (name,) = re.findall(r"metric: {name: (\w+)}", TEMPLATES["hpa.yaml"])
    assert name in (ROOT / "deploy" / "grafana" / "dashboards" / "serving.json").read_text()


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_helm_renders_every_part() -> None:
    command = ["helm", "template", "fleet", str(CHART)]
    for name, value in VALUES.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    check_rendered([part for part in YAML(typ="safe").load_all(done.stdout) if part])


def check_rendered(parts: list[dict[str, Any]]) -> None:
    """Check that objects fit each other: selectors find pods, and nothing has rights it does not need."""
    kinds = {part["kind"] for part in parts}
    assert kinds == {
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "HorizontalPodAutoscaler",
        "ServiceMonitor",
        "Ingress",
    }
    deployments = {part["metadata"]["name"]: part for part in parts if part["kind"] == "Deployment"}
    assert set(deployments) == {f"fleet-{service}" for service in SETTINGS}
    for deployment in deployments.values():
        pod = deployment["spec"]["template"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        # Kubernetes would set variables of our prefix, which the services refuse.
        assert pod["spec"]["enableServiceLinks"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {"readinessProbe", "livenessProbe", "startupProbe"} <= set(container)
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["spec"]["volumes"]
        }
    labels = [deployment["spec"]["template"]["metadata"]["labels"] for deployment in deployments.values()]
    for part in parts:
        spec = part["spec"]
        selector = spec.get("podSelector", spec.get("selector", {}))
        selector = selector.get("matchLabels", selector)
        if part["kind"] in {"Service", "PodDisruptionBudget", "NetworkPolicy"}:
            assert sum(selector.items() <= own.items() for own in labels) == 1, part["metadata"]["name"]
