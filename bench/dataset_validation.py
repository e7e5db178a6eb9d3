"""How fast a training file is validated, and in how much memory: a large one in as little as a small one.

Writes files of prompt/completion rows, or conversations, of random words; a process of its own validates each
as a job's first stage does: every line parsed and checked, every row encoded, duplicates and lengths counted.
The last line is JSON.

    python -m bench.dataset_validation --megabytes 1024
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import random
import re
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from services.common.prompts import PromptEncoder
from services.trainer.preparation import check_data
from services.trainer.spec import TrainingSpec

MIB = 1024 * 1024
BASE = Path("assets/base")
# Files of this size tell what validation takes beside the file.
SMALL_MEGABYTES = 16
_WORDS = 4000
# For tokenizers of bytes.
_LETTERS = "etaoinshrdlu"
_WORD = re.compile(r" [a-z]{2,12}")
_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class Figures:
    """One validation.

    Attributes:
        peak_rss_bytes: of the process, at the end.
        baseline_rss_bytes: of the process before it opened the file.
    """

    size_bytes: int
    rows: int
    tokens: int
    duplicate_rows: int
    seconds: float
    peak_rss_bytes: int
    baseline_rss_bytes: int


def main() -> None:
    """Validate a small file and a large one, and print what both took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--schema", choices=("prompt_completion", "messages"), default="prompt_completion")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = (
            measured(Path(folder), size, options.base, options.schema)
            for size in (SMALL_MEGABYTES, options.megabytes)
        )
    growth = large.peak_rss_bytes - small.peak_rss_bytes
    print(f"{large.size_bytes / MIB:,.0f} MiB, {large.rows:,} rows, {large.tokens:,} tokens")
    print(f"{large.seconds:.1f} s: {large.size_bytes / MIB / large.seconds:.2f} MiB/s")
    print(f"peak memory {small.peak_rss_bytes / MIB:.0f} MiB -> {large.peak_rss_bytes / MIB:.0f} MiB")
    print(
        json.dumps(
            {
                "benchmark": "dataset_validation",
                "schema": options.schema,
                "small": asdict(small),
                "large": asdict(large),
                "growth_bytes": growth,
                "growth_bytes_per_row": growth / max(1, large.rows - small.rows),
                "mib_per_second": large.size_bytes / MIB / large.seconds,
            }
        )
    )


def measured(folder: Path, megabytes: int, base: Path, schema: str) -> Figures:
    """Write a file of so many MiB and return what its validation took in a process of its own."""
    path = folder / f"{megabytes}.jsonl"
    write_rows(path, megabytes * MIB, schema, words_of(base))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_validate, args=(path, base, sender))
    process.start()
    sender.close()
    figures = receiver.recv()
    process.join()
    path.unlink()
    assert isinstance(figures, Figures), "the other end sends figures"
    return figures


def words_of(base: Path) -> list[str]:
    """Return words that the tokenizer of a base knows, and compounds of them."""
    draw = random.Random(1)
    encoder = PromptEncoder.load(base)
    tokens = [encoder.decode([number]) for number in range(encoder.vocab_size)]
    known = [token.strip() for token in tokens if _WORD.fullmatch(token)] or list(_LETTERS)
    return known + ["".join(draw.choices(known, k=2)) for _ in range(_WORDS)]


def write_rows(path: Path, size_bytes: int, schema: str, vocabulary: list[str]) -> None:
    """Write at least `size_bytes` of rows of 50 to 350 random words, one in a hundred a repetition."""
    draw = random.Random(1)
    written = 0
    with path.open("wb") as file:
        while written < size_bytes:
            lines = [_line(draw, vocabulary, schema) for _ in range(_ROWS_AT_ONCE)]
            lines[99::100] = [lines[0]] * (_ROWS_AT_ONCE // 100)
            block = b"".join(lines)
            file.write(block)
            written += len(block)


def _line(draw: random.Random, vocabulary: list[str], schema: str) -> bytes:
    words = draw.choices(vocabulary, k=draw.randint(50, 350))
    cut = len(words) * 3 // 4
    prompt, completion = " ".join(words[:cut]), " ".join(words[cut:])
    row: dict[str, object] = {"prompt": prompt, "completion": completion}
    if schema == "messages":
        turns = (("user", prompt), ("assistant", completion))
        row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    return json.dumps(row).encode("ascii") + b"\n"


def _validate(path: Path, base: Path, sender: multiprocessing.connection.Connection) -> None:
    encoder = PromptEncoder.load(base)
    # Threads and buffers of the tokenizer are there from its first use on.
    encoder.encode_texts(["warm"] * 64)
    before = _peak_rss_bytes()
    started = time.monotonic()
    report = check_data(path, None, encoder, TrainingSpec(max_seq_len=4096), seed=1)
    seconds = time.monotonic() - started
    sender.send(
        Figures(
            path.stat().st_size,
            report.rows + report.validation_rows,
            report.tokens,
            report.duplicate_rows,
            seconds,
            _peak_rss_bytes(),
            before,
        )
    )


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
