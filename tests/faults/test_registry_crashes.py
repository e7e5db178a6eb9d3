"""Row 139: the registry killed at every step of publish, alias move, delete, upload and collection."""

from __future__ import annotations

import secrets
import subprocess
import sys

import pytest

from bench.registry_kills import FAILPOINTS, run
from services.common import failpoints
from services.common.errors import LorafleetError
from tests.support.registry import Place
from tests.support.registry_fixtures import local, s3_server
from tests.support.s3_server import S3Server

__all__ = ["local", "s3_server"]

# Where the two stores differ: around the bytes, the record behind them and what is swept.
OVER_S3 = (
    "blob.before_put",
    "blob.after_put",
    "publish.before_record",
    "publish.after_record",
    "publish.after_index",
    "alias.after_record",
    "upload.after_part",
    "gc.after_delete",
)
HALVES = [FAILPOINTS[::2], FAILPOINTS[1::2]]


@pytest.mark.parametrize("names", HALVES, ids=["even", "odd"])
def test_row_139_a_killed_registry_loses_nothing_it_acknowledged(
    names: tuple[str, ...], local: Place
) -> None:
    counts = run(local, [f"{name}=kill:2" for name in names], seed=7)
    assert (counts.lost, counts.half_visible) == (0, 0)
    assert counts.kills == len(names)
    # Nearly every place is come to within a round's calls.
    assert counts.kills_at_failpoints >= counts.kills - 2
    assert counts.acknowledged >= counts.kills


def test_row_139_over_s3_too(redis_url: str, s3_server: S3Server) -> None:
    place = Place.in_s3(redis_url, s3_server, "kills-" + secrets.token_hex(8))
    counts = run(place, [f"{name}=kill:2" for name in OVER_S3], seed=11)
    assert (counts.lost, counts.half_visible) == (0, 0)
    assert counts.kills == len(OVER_S3)
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
