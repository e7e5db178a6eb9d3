"""What a model card may hold."""

from __future__ import annotations

import math

from services.common import names
from services.common.errors import InvalidArgument
from services.registry.records import Card, CardMetric

MAX_DESCRIPTION_BYTES = 16 * 1024
MAX_ENTRIES = 64
MAX_METRICS = 256
MAX_TEXT_CHARS = 1024


def check_card(card: Card) -> None:
    """Refuse a card that is too large or not true to its form.

    Raises:
        InvalidArgument: `bad_card` or `bad_digest`, naming the field.
    """
    if len(card.description.encode()) > MAX_DESCRIPTION_BYTES:
        raise _bad("description", f"at most {MAX_DESCRIPTION_BYTES} bytes", len(card.description.encode()))
    for name in ("base_model", "method", "job_id"):
        _check_text(name, getattr(card, name))
    for name in ("training_data_digest", "parent_digest"):
        if getattr(card, name):
            names.digest(getattr(card, name), field=f"header.card.{name}")
    for name in ("hyperparameters", "libraries"):
        entries: dict[str, str] = getattr(card, name)
        if len(entries) > MAX_ENTRIES:
            raise _bad(name, f"at most {MAX_ENTRIES} entries", len(entries))
        for key, value in entries.items():
            _check_text(name, key)
            _check_text(name, value)
    if len(card.stop_token_ids) > MAX_ENTRIES:
        raise _bad("stop_token_ids", f"at most {MAX_ENTRIES} ids", len(card.stop_token_ids))
    if len(card.metrics) > MAX_METRICS:
        raise _bad("metrics", f"at most {MAX_METRICS} figures", len(card.metrics))
    for metric in card.metrics:
        _check_metric(metric)


def _check_metric(metric: CardMetric) -> None:
    _check_text("metrics.name", metric.name)
    _check_text("metrics.split", metric.split)
    if metric.subject not in ("base", "adapter"):
        raise _bad("metrics.subject", '"base" or "adapter"', metric.subject)
    for number in (metric.value, metric.ci_low, metric.ci_high):
        if number is not None and not math.isfinite(number):
            raise _bad("metrics.value", "finite figures", number)


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise _bad(name, f"at most {MAX_TEXT_CHARS} characters", len(text))


def _bad(name: str, wanted: str, value: object) -> InvalidArgument:
    return InvalidArgument(
        "bad_card",
        f"The card's {name} must hold {wanted}.",
        field=f"header.card.{name}",
        value=value,
        limit=wanted,
    )
