"""Credentials from a file: what is in use while it changes, and what the metric counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.common.errors import Unavailable
from services.common.store.credentials import FileCredentials
from tests.support.metric_reader import start_reading, total

READS = "lorafleet.store.credential_reads"


def replace(path: Path, secret_key: str) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.write_text(json.dumps({"access_key": "fleet", "secret_key": secret_key}))
    fresh.replace(path)


def reads(reason: str | None) -> float:
    return total(READS, {"error.type": reason})


def test_a_new_secret_is_read_once_and_counted(tmp_path: Path) -> None:
    start_reading()
    path = tmp_path / "store.json"
    replace(path, "first")
    before = reads(None)
    credentials = FileCredentials(path)
    assert [credentials.retrieve().secret_key for _ in range(3)] == ["first"] * 3
    assert reads(None) == before + 1
    replace(path, "second-and-longer")
    assert [credentials.retrieve().secret_key for _ in range(3)] == ["second-and-longer"] * 3
    assert reads(None) == before + 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ('{"access_key": "fleet"}', "ValueError"),
        ('{"access_key": "fleet", "secret_key": ""}', "ValueError"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_read_leaves_the_last_secret_and_is_counted_by_reason(
    text: str | None, reason: str, tmp_path: Path
) -> None:
    start_reading()
    path = tmp_path / "store.json"
    replace(path, "first")
    credentials = FileCredentials(path)
    credentials.retrieve()
    whole, failed = reads(None), reads(reason)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert credentials.retrieve().secret_key == "first"
    assert (reads(None), reads(reason)) == (whole, failed + 1)
    replace(path, "second")
    assert credentials.retrieve().secret_key == "second"
    assert (reads(None), reads(reason)) == (whole + 1, failed + 1)


def test_nothing_to_start_from_is_refused(tmp_path: Path) -> None:
    start_reading()
    before = reads("FileNotFoundError")
    with pytest.raises(Unavailable) as caught:
        FileCredentials(tmp_path / "store.json").retrieve()
    assert caught.value.reason == "store_unavailable"
    assert reads("FileNotFoundError") == before + 1
