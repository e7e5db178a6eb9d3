"""Row 139: the registry killed at every step of publish, alias move, delete, upload and collection."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.registry_kills import FAILPOINTS, run
from services.common import failpoints
from services.common.errors import LorafleetError

HALVES = [FAILPOINTS[::2], FAILPOINTS[1::2]]


@pytest.mark.parametrize("names", HALVES, ids=["even", "odd"])
def test_row_139_a_killed_registry_loses_nothing_it_acknowledged(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    counts = run(tmp_path, [f"{name}=kill:2" for name in names], seed=7)
    assert (counts.lost, counts.half_visible) == (0, 0)
    assert counts.kills == len(names)
    # Nearly every place is come to within a round's calls.
    assert counts.kills_at_failpoints >= counts.kills - 2
    assert counts.acknowledged >= counts.kills


def test_a_failpoint_ends_the_process_at_the_visit_that_it_names() -> None:
    program = (
        "from services.common.failpoints import failpoint\n"
        "for number in range(5):\n"
        "    print(number, flush=True)\n"
        "    failpoint('a.b')\n"
        "    failpoint('a.c')\n"
    )
    environment = {failpoints.VARIABLE: "a.b=kill:3"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split()) == (-9, ["0", "1", "2"])


@pytest.mark.parametrize("rule", ["a.b", "a.b=stop", "a.b=kill:0", "a=kill", "a.b=kill:x", "A.b=kill"])
def test_a_rule_that_means_nothing_is_refused(rule: str) -> None:
    with pytest.raises(LorafleetError, match="bad_failpoint"):
        failpoints.arm(rule)
