"""JSON log lines on standard error, by the standard library's `logging`.

One line is one object: `ts`, `level`, `logger`, `message`, `service`, then `request_id`, `tenant` and
`trace_id` where there are any, then whatever a call passed as `extra`. JSON escapes line breaks and control
characters, so no value can forge a line; long values are cut. Where nobody takes the lines any more, or the
disk they go to is full, they are dropped: no call ever waits for its log.
"""

from __future__ import annotations

import json
import logging
import os
import select
import traceback
from datetime import UTC, datetime

from opentelemetry import trace

from services.common import call_context
from services.common.errors import capped

VALUE_LIMIT_CHARS = 2000
TRACE_LIMIT_CHARS = 16_000
_STANDARD_ERROR = 2
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


class NeverBlockingHandler(logging.Handler):
    """Writes lines to a file, a pipe or a socket, and drops those that it cannot take at once.

    After a gap one line tells how many are missing.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._num_dropped = 0
        self._is_cut = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, or drop it."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a mistake in a log line must not reach the caller
            self.handleError(record)
            return
        if self._num_dropped and self._write(self._gap()):
            self._num_dropped = 0
        self._num_dropped += bool(self._num_dropped) or not self._write(line)

    def _gap(self) -> str:
        return self.format(
            logging.makeLogRecord(
                {
                    "name": "lorafleet.logs",
                    "levelname": "WARNING",
                    "msg": "lines were dropped",
                    "dropped_lines": self._num_dropped,
                }
            )
        )

    def _write(self, line: str) -> bool:
        was_cut, self._is_cut = self._is_cut, False
        data = (b"\n" if was_cut else b"") + line.encode() + b"\n"
        for start in range(0, len(data), select.PIPE_BUF):
            # What polls as writable takes that much without waiting.
            try:
                if not self._poll.poll(0):
                    raise BlockingIOError
                os.write(self._descriptor, data[start : start + select.PIPE_BUF])
            except OSError:
                self._is_cut = was_cut or start > 0
                return False
        return True


def configure(service: str, level: str = "INFO") -> None:
    """Send every log record of this process, from `level` up, to standard error as JSON."""
    handler = NeverBlockingHandler(_STANDARD_ERROR)
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
