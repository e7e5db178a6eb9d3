"""Log lines: one JSON object each, whatever is logged."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from services.common.call_context import call_scope
from services.common.logs import JsonFormatter

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
