"""JSON log lines on standard error, by the standard library's `logging`.

One line is one object: `ts`, `level`, `logger`, `message`, `service`, then `request_id`, `tenant` and
`trace_id` where there are any, then whatever a call passed as `extra`. JSON escapes line breaks and control
characters, so no value can forge a line; long values are cut.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime

from opentelemetry import trace

from services.common import call_context
from services.common.errors import capped

VALUE_LIMIT_CHARS = 2000
TRACE_LIMIT_CHARS = 16_000
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": capped(record.getMessage(), VALUE_LIMIT_CHARS),
            "service": self._service,
        }
        span = trace.get_current_span().get_span_context()
        facts = {
            "request_id": call_context.request_id(),
            "tenant": call_context.tenant_or_none(),
            "trace_id": trace.format_trace_id(span.trace_id) if span.is_valid else None,
        }
        line |= {key: value for key, value in facts.items() if value is not None}
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD_ATTRIBUTES}
        line |= {key: _plain(value) for key, value in extra.items()}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = _tail("".join(traceback.format_exception(*record.exc_info)))
        return json.dumps(line, ensure_ascii=True, allow_nan=False)


def configure(service: str, level: str = "INFO") -> None:
    """Send every log record of this process, from `level` up, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    # NaN and infinity are not JSON.
    if isinstance(value, float) and abs(value) < float("inf"):
        return value
    return capped(value if isinstance(value, str) else repr(value), VALUE_LIMIT_CHARS)


def _tail(text: str) -> str:
    """Cut a stack trace at its head: the error itself stands at the end."""
    return text if len(text) <= TRACE_LIMIT_CHARS else "…" + text[-(TRACE_LIMIT_CHARS - 1) :]
