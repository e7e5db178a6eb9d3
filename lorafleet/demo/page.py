"""The demo's report as one HTML file: two tables with plots, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from lorafleet.demo.report import Load, Report, TaskResult

_MILLISECONDS = 1000
_WIDTH, _ROW, _LABEL, _VALUE = 720, 34, 170, 110
_PLOT = _WIDTH - _LABEL - _VALUE

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d0d7de; --dim: #59636e;
  --base: #8c959f; --adapter: #0969da; --cold: #54aeff; --warm: #bc4c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #3d444d;
  --dim: #9198a1; --base: #9198a1; --adapter: #58a6ff; --cold: #79c0ff; --warm: #f0883e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, figcaption { color: var(--dim); } figure { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.scroll { overflow-x: auto; } svg { display: block; max-width: 100%; min-width: 34rem; }
svg.key { display: inline; min-width: 0; width: .8rem; }
svg text { font-size: 12px; fill: var(--ink); } svg .dim { fill: var(--dim); }
svg .grid { stroke: var(--line); } .b { fill: var(--base); stroke: var(--base); }
.a { fill: var(--adapter); stroke: var(--adapter); } .c { fill: var(--cold); } .w { fill: var(--warm); }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the report to `path`; the folder is made if it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """Return the whole page."""
    agreement = report.agreement
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in report.seconds.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Lorafleet demo</title><style>{_STYLE}</style></head><body>
<h1>Lorafleet demo</h1>
<p>{len(report.tasks)} adapters of {escape(report.base)}, trained on this machine and served from one copy
of the base. Seconds: {escape(seconds)}.</p>
<h2>What fine-tuning did</h2>
<p>Test rows asked through the HTTP gateway. Bars are 95 % bootstrap intervals.</p>
<figure>{_scores(report.tasks)}<figcaption>{_key("b")} base, {_key("a")} adapter</figcaption></figure>
<div class="scroll">{_task_table(report.tasks)}</div>
<h2>Serving</h2>
<p>Answers served mixed that equal the same ones served alone, to the letter: <b>{agreement.equal} of
{agreement.total}</b>. Cold: the inference service held nothing of the adapters; warm: the same requests
again.</p>
<figure>{_bars(report.loads, "tokens a second", _tokens_per_second)}</figure>
<figure>{_bars(report.loads, "time to the first token, median, in ms", _first_token)}</figure>
<div class="scroll">{_load_table(report.loads)}</div>
</body></html>
"""


def _key(kind: str) -> str:
    return f'<svg class="key" viewBox="0 0 12 12"><circle class="{kind}" cx="6" cy="6" r="5"/></svg>'


def _scores(tasks: Sequence[TaskResult]) -> str:
    """One row a task: both scores as points with their intervals, over 0 to 1."""
    parts = [_grid(len(tasks), [(tick / 4, f"{tick / 4:.2f}") for tick in range(5)])]
    for row, task in enumerate(tasks):
        middle = _ROW * row + _ROW // 2
        parts.append(f'<text x="0" y="{middle + 4}">{escape(task.task)}</text>')
        for score, kind, y in ((task.base, "b", middle - 6), (task.adapter, "a", middle + 6)):
            low, high, at = (
                _LABEL + _PLOT * max(0.0, min(1.0, v)) for v in (score.low, score.high, score.value)
            )
            parts.append(
                f'<line class="{kind}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke-width="3"/>'
                f'<circle class="{kind}" cx="{at:.1f}" cy="{y}" r="5"/>'
            )
        parts.append(f'<text class="dim" x="{_WIDTH - _VALUE + 14}" y="{middle + 4}">')
        parts.append(f"{task.base.value:.2f} → {task.adapter.value:.2f}</text>")
    return _svg(len(tasks), parts)


def _tokens_per_second(load: Load) -> float:
    return load.tokens_per_second


def _first_token(load: Load) -> float:
    return load.first_token_p50_seconds * _MILLISECONDS


def _bars(loads: Sequence[Load], title: str, figure: Callable[[Load], float]) -> str:
    values = [figure(load) for load in loads]
    most = max([*values, 1e-9])
    parts = [f'<text class="dim" x="{_LABEL}" y="14">{escape(title)}</text>']
    for row, (load, value) in enumerate(zip(loads, values, strict=True), start=1):
        y = _ROW * row - 10
        kind = "c" if load.name.endswith(", cold") else "w" if load.name.endswith(", warm") else "b"
        parts.append(
            f'<text x="0" y="{y + 14}">{escape(load.name)}</text>'
            f'<rect class="{kind}" x="{_LABEL}" y="{y}" width="{_PLOT * value / most:.1f}" height="20"/>'
            f'<text class="dim" x="{_WIDTH - _VALUE + 14}" y="{y + 14}">{value:,.0f}</text>'
        )
    return _svg(len(loads), parts)


def _grid(rows: int, ticks: Sequence[tuple[float, str]]) -> str:
    bottom = _ROW * rows
    places = [(_LABEL + _PLOT * at, label) for at, label in ticks]
    return "".join(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
        f'<text class="dim" x="{x - 10:.1f}" y="{bottom + 16}">{label}</text>'
        for x, label in places
    )


def _svg(rows: int, parts: Sequence[str]) -> str:
    height = _ROW * rows + 24
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _task_table(tasks: Sequence[TaskResult]) -> str:
    header = (
        "task",
        "metric",
        "base",
        "adapter",
        "lift",
        "95 % interval",
        "test rows",
        "train rows",
        "trained in",
    )
    rows = [
        (
            task.task,
            task.metric,
            f"{task.base.value:.3f}",
            f"{task.adapter.value:.3f}",
            f"{task.lift.value:+.3f}",
            f"{task.lift.low:+.2f} to {task.lift.high:+.2f}",
            str(task.test_rows),
            str(task.train_rows),
            f"{task.training_seconds:.0f} s",
        )
        for task in tasks
    ]
    return _table(header, rows)


def _load_table(loads: Sequence[Load]) -> str:
    header = (
        "load",
        "streams",
        "requests",
        "failed",
        "tokens/s",
        "TTFT p50",
        "TTFT p95",
        "gap p50",
        "gap p95",
    )
    rows = [
        (
            load.name,
            str(load.streams),
            str(load.requests),
            str(sum(load.failures.values())),
            f"{load.tokens_per_second:,.0f}",
            *(
                f"{seconds * _MILLISECONDS:,.0f} ms"
                for seconds in (
                    load.first_token_p50_seconds,
                    load.first_token_p95_seconds,
                    load.between_tokens_p50_seconds,
                    load.between_tokens_p95_seconds,
                )
            ),
        )
        for load in loads
    ]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
