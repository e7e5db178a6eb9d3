"""Row 54: a large training file is read in the memory of a small one; the bench reads a gigabyte."""

from __future__ import annotations

from pathlib import Path

from bench.dataset_validation import MIB, measured
from tests.support.models import byte_tokenizer


def test_row_54_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    base = tmp_path / "base"
    byte_tokenizer().save_pretrained(base)
    (base / "config.json").write_text('{"eos_token_id": 0}', "ascii")
    small, large = (measured(tmp_path, size, base, "prompt_completion") for size in (2, 12))
    assert large.rows > 5 * small.rows
    assert large.duplicate_rows == large.rows // 100
    assert large.peak_rss_bytes - small.peak_rss_bytes < 5 * MIB
