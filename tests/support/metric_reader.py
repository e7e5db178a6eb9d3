"""The metrics of this process, read in memory; a process can have one meter provider only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint


@cache
def _reader() -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    return reader


def start_reading() -> None:
    """Begin to collect; what was measured before is not seen."""
    _reader()


def total(name: str, attributes: Mapping[str, object]) -> float:
    """Return the sum of a counter, or the count of a histogram, over the points with these attributes."""
    found = 0.0
    data = _reader().get_metrics_data()
    if data is None:
        return found
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                if metric.name == name:
                    found += sum(_amount(p) for p in metric.data.data_points if _fits(p, attributes))
    return found


def _fits(point: object, attributes: Mapping[str, object]) -> bool:
    own = dict(getattr(point, "attributes", None) or {})
    return all(own.get(key) == value for key, value in attributes.items())


def _amount(point: object) -> float:
    if isinstance(point, HistogramDataPoint):
        return point.count
    assert isinstance(point, NumberDataPoint), "no other kinds are declared"
    return float(point.value)
