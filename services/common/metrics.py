"""Every metric of every service, declared in one table before it is used.

Names follow OpenTelemetry's conventions; the Prometheus port shows `rpc.server.call.duration` in seconds as
`rpc_server_call_duration_seconds`. An instrument can be had only for a name in the table::

    _calls = metrics.histogram("rpc.server.call.duration")
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from opentelemetry import metrics
from opentelemetry.metrics import CallbackT, Counter, Histogram, Meter, ObservableGauge, UpDownCounter


class Kind(Enum):
    """How a metric adds up."""

    COUNTER = "counter"
    UP_DOWN_COUNTER = "up_down_counter"
    HISTOGRAM = "histogram"
    OBSERVABLE_GAUGE = "observable_gauge"


class Metric(NamedTuple):
    """One row of the table: its unit in UCUM, what it tells, and the attributes that it comes with."""

    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...]
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)
# A job's series last as long as its run, so there are no more of them than jobs in work.
_JOB = ("job", "base", "adapter")

METRICS: dict[str, Metric] = {
    "rpc.server.call.duration": Metric(
        Kind.HISTOGRAM,
        "s",
        "Time from a call's arrival to its end, by how it ended.",
        ("rpc.method", "rpc.response.status_code", "error.type"),
        _SECONDS,
    ),
    "lorafleet.rpc.server.calls_in_flight": Metric(
        Kind.UP_DOWN_COUNTER, "{call}", "Calls that have arrived and not ended.", ("rpc.method",)
    ),
    "lorafleet.rpc.server.calls_without_deadline": Metric(
        Kind.COUNTER, "{call}", "Calls whose client set no deadline.", ("rpc.method",)
    ),
    "lorafleet.server.info": Metric(
        Kind.UP_DOWN_COUNTER,
        "{server}",
        "1 for the server of this process: how its callers connect, and whether it was told to open anyway.",
        ("security", "insecure_bind"),
    ),
    "lorafleet.store.credential_reads": Metric(
        Kind.COUNTER,
        "{read}",
        "Reads of the store's file of credentials when it was new or had changed; failed ones by reason.",
        ("error.type",),
    ),
    "lorafleet.inference.sequences.running": Metric(
        Kind.UP_DOWN_COUNTER, "{sequence}", "Sequences that hold a place in the batch.", ()
    ),
    "lorafleet.inference.sequences.waiting": Metric(
        Kind.UP_DOWN_COUNTER,
        "{sequence}",
        "Sequences that wait, by what they wait for: a place, or their adapter.",
        ("for",),
    ),
    "lorafleet.inference.kv.used": Metric(
        Kind.UP_DOWN_COUNTER, "By", "Bytes of the KV cache that sequences hold.", ()
    ),
    "lorafleet.inference.kv.cached": Metric(
        Kind.UP_DOWN_COUNTER, "By", "Bytes of the KV cache that only the prefix cache holds.", ()
    ),
    "lorafleet.inference.kv.total": Metric(
        Kind.UP_DOWN_COUNTER, "By", "Bytes of the KV cache, as far as it has grown.", ()
    ),
    "lorafleet.inference.prefix_cache.tokens": Metric(
        Kind.COUNTER, "{token}", "Prompt tokens, by whether the prefix cache had them.", ("result",)
    ),
    "lorafleet.inference.tokens": Metric(
        Kind.COUNTER, "{token}", "Tokens of prompts that were taken in, and of completions.", ("kind",)
    ),
    "lorafleet.inference.preemptions": Metric(
        Kind.COUNTER, "{preemption}", "Sequences that had to make way and were computed again.", ()
    ),
    "lorafleet.inference.steps": Metric(Kind.COUNTER, "{step}", "Steps of the engine.", ()),
    "lorafleet.inference.time_to_first_token": Metric(
        Kind.HISTOGRAM, "s", "Time from a request's admission to its first token.", (), _SECONDS
    ),
    "lorafleet.inference.queue.duration": Metric(
        Kind.HISTOGRAM, "s", "The part of it before the request first ran.", (), _SECONDS
    ),
    "lorafleet.inference.inter_token.duration": Metric(
        Kind.HISTOGRAM, "s", "Time between two tokens of one completion.", (), _SECONDS
    ),
    "lorafleet.inference.adapter.requests": Metric(
        Kind.COUNTER,
        "{request}",
        "Requests by adapter version, a bounded number of them by name, and whether it was on the host.",
        ("adapter", "result"),
    ),
    "lorafleet.inference.adapter.loads": Metric(
        Kind.COUNTER, "{load}", "Loads of adapters that ended, those that failed by reason.", ("error.type",)
    ),
    "lorafleet.inference.adapter.load_stage.duration": Metric(
        Kind.HISTOGRAM,
        "s",
        "Time of a load by stage: download, verify, parse, copy.",
        ("stage",),
        _SECONDS,
    ),
    "lorafleet.inference.adapter.wait.duration": Metric(
        Kind.HISTOGRAM,
        "s",
        "Time from the first request for an adapter that was not on the host until it was.",
        (),
        _SECONDS,
    ),
    "lorafleet.inference.adapter.bytes": Metric(
        Kind.UP_DOWN_COUNTER, "By", "Bytes of adapters by tier: disk, host, device.", ("tier",)
    ),
    "lorafleet.inference.adapter.evictions": Metric(
        Kind.COUNTER, "{adapter}", "Adapters that made room for others, by tier: host, device.", ("tier",)
    ),
    "lorafleet.trainer.jobs.ended": Metric(
        Kind.COUNTER,
        "{job}",
        "Runs of jobs that ended, by the state after it; `queued` where the job waits for another worker.",
        ("state", "error.type"),
    ),
    "lorafleet.trainer.job.step": Metric(
        Kind.OBSERVABLE_GAUGE, "{step}", "Optimizer steps of a job in work.", _JOB
    ),
    "lorafleet.trainer.job.total_steps": Metric(
        Kind.OBSERVABLE_GAUGE, "{step}", "Optimizer steps that a job in work has in all.", _JOB
    ),
    "lorafleet.trainer.job.loss": Metric(
        Kind.OBSERVABLE_GAUGE, "1", "Training loss of the last step, in nats a token.", _JOB
    ),
    "lorafleet.trainer.job.learning_rate": Metric(
        Kind.OBSERVABLE_GAUGE, "1", "Learning rate of the last step.", _JOB
    ),
    "lorafleet.trainer.job.gradient_norm": Metric(
        Kind.OBSERVABLE_GAUGE, "1", "Norm of the last gradient, before clipping.", _JOB
    ),
    "lorafleet.trainer.job.throughput": Metric(
        Kind.OBSERVABLE_GAUGE, "{token}/s", "Tokens through the model, over the last steps.", _JOB
    ),
    "lorafleet.trainer.job.eta": Metric(
        Kind.OBSERVABLE_GAUGE, "s", "Time that the remaining steps will take at this pace.", _JOB
    ),
    "lorafleet.trainer.job.memory.peak": Metric(
        Kind.OBSERVABLE_GAUGE, "By", "Most memory that the job's process has held so far.", _JOB
    ),
}


def counter(name: str) -> Counter:
    """Return the counter of this name; `KeyError` where the table has none."""
    row = _declared(name, Kind.COUNTER)
    return _meter().create_counter(name, row.unit, row.description)


def up_down_counter(name: str) -> UpDownCounter:
    """Return the counter of this name that also counts down; `KeyError` where the table has none."""
    row = _declared(name, Kind.UP_DOWN_COUNTER)
    return _meter().create_up_down_counter(name, row.unit, row.description)


def observable_gauge(name: str, *, callbacks: Sequence[CallbackT]) -> ObservableGauge:
    """Return the gauge of this name, read from `callbacks`; `KeyError` where the table has none."""
    row = _declared(name, Kind.OBSERVABLE_GAUGE)
    return _meter().create_observable_gauge(name, callbacks, row.unit, row.description)


def histogram(name: str) -> Histogram:
    """Return the histogram of this name; `KeyError` where the table has none."""
    row = _declared(name, Kind.HISTOGRAM)
    return _meter().create_histogram(
        name, row.unit, row.description, explicit_bucket_boundaries_advisory=row.boundaries
    )


def _declared(name: str, kind: Kind) -> Metric:
    row = METRICS[name]
    assert row.kind is kind, f"{name} is declared as a {row.kind.value}"
    return row


def _meter() -> Meter:
    return metrics.get_meter("lorafleet")
