"""Log lines: one JSON object each, whatever is logged."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from services.common.call_context import call_scope
from services.common.logs import JsonFormatter, NeverBlockingHandler

ROOT = Path(__file__).parents[3]


def line(message: str, *args: object, exc_info: Any = None, **extra: object) -> dict[str, Any]:
    record = logging.getLogger("lorafleet.test").makeRecord(
        "lorafleet.test", logging.INFO, __file__, 1, message, args, exc_info, extra=extra
    )
    text = JsonFormatter("registry").format(record)
    assert "\n" not in text
    assert text.isascii()
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def test_a_line_says_who_when_and_what() -> None:
    with call_scope(request_id="r-1", tenant="acme"):
        found = line("loaded %s", "billing", rank=8, seconds=0.5, adapter=Path("x"))
    assert found["message"] == "loaded billing"
    assert found["level"] == "INFO"
    assert found["service"] == "registry"
    assert found["logger"] == "lorafleet.test"
    assert (found["request_id"], found["tenant"]) == ("r-1", "acme")
    assert (found["rank"], found["seconds"]) == (8, 0.5)
    assert "x" in found["adapter"]
    assert found["ts"].endswith("+00:00")
    assert "request_id" not in line("outside")


def test_no_value_can_forge_or_flood_a_line() -> None:
    found = line('evil\n{"level": "ERROR"}\x1b[31m\u2028', name_given="x" * 10_000, ratio=float("nan"))
    assert found["level"] == "INFO"
    assert found["message"].startswith("evil\n")
    assert len(found["name_given"]) == 2000
    assert found["ratio"] == "nan"


def test_a_long_trace_keeps_its_end() -> None:
    try:
        raise ValueError("y" * 20_000 + "the end")
    except ValueError:
        found = line("failed", exc_info=sys.exc_info())
    assert found["exception"].endswith("the end\n")
    assert len(found["exception"]) == 16_000


def test_configure_takes_over_the_whole_process() -> None:
    program = (
        "import logging, warnings\n"
        "from services.common import logs\n"
        "logs.configure('trainer', 'WARNING')\n"
        "logging.getLogger('foreign').info('hidden')\n"
        "logging.getLogger('foreign').warning('shown')\n"
        "warnings.warn('careful')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    lines = [json.loads(text) for text in done.stderr.splitlines()]
    assert [item["logger"] for item in lines] == ["foreign", "py.warnings"]
    assert lines[0]["message"] == "shown"
    assert "careful" in lines[1]["message"]


def logger_to(descriptor: int) -> logging.Logger:
    handler = NeverBlockingHandler(descriptor)
    handler.setFormatter(JsonFormatter("registry"))
    logger = logging.Logger("lorafleet.test")
    logger.addHandler(handler)
    return logger


@pytest.mark.timeout(20)
def test_row_135_lines_that_nobody_takes_are_dropped_and_counted() -> None:
    reader, writer = os.pipe()
    logger = logger_to(writer)
    for number in range(1000):
        # Longer than what a pipe takes at once, so that a line is cut, too.
        logger.warning("line %d", number, extra=dict.fromkeys("abc", "x" * 1900))
    taken = os.read(reader, 2**20)
    logger.warning("after")
    os.close(writer)
    with os.fdopen(reader, "rb") as rest:
        taken += rest.read()
    lines = taken.decode().splitlines()
    whole = [json.loads(text) for text in lines if text.endswith("}")]
    assert len(lines) - len(whole) <= 1
    assert whole[0]["message"] == "line 0"
    assert [item["message"] for item in whole[-2:]] == ["lines were dropped", "after"]
    assert whole[-2]["dropped_lines"] + len(whole) - 2 == 1000


def test_row_135_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    logger = logger_to(descriptor)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        logger.warning("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    logger.warning("kept")
    os.close(descriptor)
    lines = [json.loads(text) for text in (tmp_path / "log").read_text().splitlines()]
    assert [item["message"] for item in lines] == ["lines were dropped", "kept"]
