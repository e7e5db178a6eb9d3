"""Dashboards, alerts and scrape settings against the metrics that the services really export."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
# In a process of its own, since a process can have one meter provider only: every metric of the table once,
# through the exporter that answers Prometheus.
EXPORT = """
import json
import prometheus_client
from opentelemetry import metrics as api
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from services.common import metrics
from services.common.metrics import METRICS, Kind

api.set_meter_provider(MeterProvider([PrometheusMetricReader()]))
for name, row in METRICS.items():
    attributes = dict.fromkeys(row.attributes, "x")
    if row.kind is Kind.COUNTER:
        metrics.counter(name).add(1, attributes)
    elif row.kind is Kind.UP_DOWN_COUNTER:
        metrics.up_down_counter(name).add(1, attributes)
    elif row.kind is Kind.HISTOGRAM:
        metrics.histogram(name).record(1, attributes)
    else:
        seen = [Observation(1, attributes)]
        metrics.observable_gauge(name, callbacks=[lambda _, seen=seen: seen])
samples = [sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples]
print(json.dumps({sample.name: sorted(sample.labels) for sample in samples}))
"""
OURS = re.compile(r"\b((?:lorafleet|rpc)_\w+)(?=[\s{)\[<>=]|$)")
# What Prometheus adds to every series.
TARGET_LABELS = {"service", "job", "instance", "le"}


@cache
def exported() -> dict[str, set[str]]:
    """Return the labels of each series that services export, by its name as Prometheus sees it."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    return {name: set(labels) for name, labels in json.loads(done.stdout).items()}


def yaml(path: Path) -> dict[str, Any]:
    loaded = YAML(typ="safe").load(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def dashboard_queries(path: Path) -> list[str]:
    panels = json.loads(path.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    groups = yaml(DEPLOY / "prometheus" / "rules.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def labels_of(query: str) -> set[str]:
    """Return the labels that a query groups by or selects on."""
    grouped = re.findall(r"\bby \(([^)]*)\)", query)
    selected = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)
    return {label.strip() for group in grouped for label in group.split(",")} | set(selected)


def check(query: str) -> None:
    names = {name for name in OURS.findall(re.sub(r'"[^"]*"', '""', query)) if name not in labels_of(query)}
    assert names or query.startswith("up{"), query
    for name in names:
        assert name in exported(), f"{name} in {query}"
    known = TARGET_LABELS.union(*(exported()[name] for name in names))
    assert labels_of(query) <= known, query


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_metrics_that_exist(path: Path) -> None:
    queries = dashboard_queries(path)
    assert queries
    for query in queries:
        check(query)


def test_dashboards_show_every_metric_there_is() -> None:
    shown = " ".join(query for path in DASHBOARDS for query in dashboard_queries(path))
    ours = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported() if OURS.match(name)}
    assert {name for name in ours if name not in shown} == set()


def test_dashboards_are_told_apart_and_use_the_datasource_that_is_provisioned() -> None:
    dashboards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({dashboard["uid"] for dashboard in dashboards}) == len(dashboards) >= 4
    provisioned = yaml(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")
    uids = {source["uid"] for source in provisioned["datasources"]}
    assert {panel["datasource"]["uid"] for dashboard in dashboards for panel in dashboard["panels"]} <= uids


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_watches_metrics_that_exist(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    shown = re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))
    grouped = re.search(r"\bby \(([^)]*)\)", rule["expr"])
    if grouped is not None:
        assert set(shown) <= {label.strip() for label in grouped[1].split(",")}


def test_a_name_that_is_not_exported_is_found() -> None:
    with pytest.raises(AssertionError, match="lorafleet_inference_tokens in"):
        check("sum(lorafleet_inference_tokens)")
    with pytest.raises(AssertionError, match="by \\(tenant\\)"):
        check("sum by (tenant) (lorafleet_inference_tokens_total)")


def test_prometheus_asks_the_ports_that_the_services_open() -> None:
    (scraped,) = yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    targets = {target for group in scraped["static_configs"] for target in group["targets"]}
    services = yaml(ROOT / "docker-compose.yml")["services"]
    opened = {
        f"{name}:{value.rpartition(':')[2]}"
        for name, service in services.items()
        for variable, value in service.get("environment", {}).items()
        if variable.endswith("_METRICS_LISTEN") and not name.endswith("-gpu")
    }
    assert targets == opened
    # A trainer's series have a label `job` that a target's must not replace.
    assert scraped["honor_labels"] is True


def test_the_collector_takes_both_kinds_and_sends_traces_on() -> None:
    collector = yaml(DEPLOY / "otel" / "collector.yml")
    for pipeline in collector["service"]["pipelines"].values():
        for part in ("receivers", "processors", "exporters"):
            assert set(pipeline[part]) <= set(collector[part])
    assert set(collector["service"]["pipelines"]) == {"traces", "metrics"}
    host = collector["exporters"]["otlp/traces"]["endpoint"].split(":")[0]
    assert host in yaml(ROOT / "docker-compose.yml")["services"]
