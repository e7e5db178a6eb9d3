"""Row 58: job processes and trainers killed at stages drawn at random; the bench kills a hundred."""

from __future__ import annotations

from pathlib import Path

from bench.job_kills import run


def test_row_58_killed_jobs_end_with_one_version_equal_to_the_last_bit(tmp_path: Path) -> None:
    counts = run(tmp_path, kills=3, seed=5)
    assert counts.kills >= 3
    assert counts.jobs > 0
    failures = (counts.wrong_versions, counts.different, counts.not_succeeded, counts.broken_histories)
    assert failures == (0, 0, 0, 0)
