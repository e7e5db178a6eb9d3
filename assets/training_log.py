"""Joins the logs of the pretraining's stages, thins them to at most 200 lines, and draws the loss curve.

python -m assets.training_log --logs assets/.cache/training_log-reading.jsonl --out assets/base
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

MAX_LINES = 200
_COUNTED = ("step", "tokens", "elapsed_seconds")
_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48

Line = dict[str, float]


def joined(logs: Sequence[list[Line]]) -> list[Line]:
    """Puts the stages one after the other: steps, tokens and seconds go on counting where a stage begins."""
    lines: list[Line] = []
    for log in logs:
        done = lines[-1] if lines else {}
        lines += [{**line, **{key: line[key] + done.get(key, 0) for key in _COUNTED}} for line in log]
    return lines


def thin(lines: list[Line], max_lines: int = MAX_LINES) -> list[Line]:
    """Merges neighbours into groups of equal length: the last line of each, with the group's mean loss."""
    if not lines:
        raise ValueError("the log has no lines")
    size = -(-len(lines) // max_lines)
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [{**group[-1], "loss": round(fmean(line["loss"] for line in group), 4)} for group in groups]


def loss_curve_svg(lines: list[Line]) -> str:
    """Draws loss (nats a token) over tokens read (millions) as a small SVG picture."""
    top = max(line["loss"] for line in lines)
    bottom = min(line["loss"] for line in lines)
    most = lines[-1]["tokens"]

    def at(tokens: float, loss: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * tokens / most
        y = _MARGIN + (_HEIGHT - 2 * _MARGIN) * (top - loss) / (top - bottom)
        return round(x, 1), round(y, 1)

    points = " ".join(f"{x},{y}" for x, y in (at(line["tokens"], line["loss"]) for line in lines))
    left, right, low, high = _MARGIN, _WIDTH - _MARGIN, _HEIGHT - _MARGIN, _MARGIN
    labels = (
        (left - 40, high + 4, f"{top:.2f}"),
        (left - 40, low + 4, f"{bottom:.2f}"),
        (left, low + 20, "0"),
        (right - 30, low + 20, f"{most / 1e6:.1f} M"),
        (_WIDTH // 2 - 40, low + 36, "tokens read"),
        (left, high - 16, "training loss, nats a token"),
    )
    texts = "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#333"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>'
        f'<path d="M{left} {high}V{low}H{right}" fill="none" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>{texts}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Join and thin the training logs and draw the loss curve.")
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="of the stages, in their order")
    parser.add_argument("--out", type=Path, default=Path("assets/base"))
    arguments = parser.parse_args()
    logs = [log.read_text(encoding="utf-8").splitlines() for log in arguments.logs]
    lines = thin(joined([[json.loads(line) for line in log] for log in logs]))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (arguments.out / "training_log.jsonl").write_text(text, encoding="utf-8")
    (arguments.out / "loss.svg").write_text(loss_curve_svg(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
