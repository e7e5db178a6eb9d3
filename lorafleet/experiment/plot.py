"""Pictures: base and adapter of each run, and what goes with what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafleet.experiment.heuristics import HEURISTICS
from lorafleet.experiment.line import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES_PER_LINE = 0.32
_WIDTH_INCHES = 9.0
# Text on cells of a stronger correlation is white.
_DARK = 0.6
_BASE_COLOUR = "#9aa5b1"
_ADAPTER_COLOUR = "#1f6feb"
_MAJORITY_COLOUR = "#d29922"
_BAYES_COLOUR = "#8250df"


class PlotError(Exception):
    """The picture cannot be drawn."""


def write_plot(name: str, lines: Sequence[Line], path: Path) -> None:
    """Draw the runs that were scored to `path`, in the format of its suffix.

    Raises:
        PlotError: the plotting library is not installed.
    """
    scored = [line for line in lines if line.lift is not None][::-1]
    figure = _figure(1.2 + _INCHES_PER_LINE * len(scored))
    axes = figure.add_subplot()
    for height, line in enumerate(scored):
        base, adapter = line.base_score or 0.0, line.adapter_score or 0.0
        axes.plot([base, adapter], [height, height], color=_ADAPTER_COLOUR, alpha=0.35, linewidth=2)
        axes.plot(base, height, "o", color=_BASE_COLOUR, label="base" if height == 0 else None)
        low, high = line.adapter_low or 0.0, line.adapter_high or 0.0
        axes.errorbar(
            adapter,
            height,
            xerr=[[max(0.0, adapter - low)], [max(0.0, high - adapter)]],
            fmt="o",
            color=_ADAPTER_COLOUR,
            capsize=3,
            label="adapter, with its 95 % interval" if height == 0 else None,
        )
        for baseline, colour, label in (
            (line.majority, _MAJORITY_COLOUR, "majority label"),
            (line.naive_bayes, _BAYES_COLOUR, "naive Bayes"),
        ):
            if baseline is not None:
                axes.plot(baseline, height, "|", color=colour, markersize=12, markeredgewidth=2, label=label)
    axes.set_yticks(range(len(scored)), [_label(line, scored) for line in scored])
    axes.set_xlabel("score on the test rows, served")
    axes.set_title(name)
    axes.grid(axis="x", alpha=0.3)
    if scored:
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=len(once))
    figure.savefig(path)


def write_correlations(found: dict[str, Any], path: Path) -> None:
    """Draw the correlations of heuristics with qualities as a heat map.

    Raises:
        PlotError: the plotting library is not installed.
    """
    table: dict[str, dict[str, float | None]] = found["pearson"]
    figure = _figure(1.5 + _INCHES_PER_LINE * len(HEURISTICS))
    axes = figure.add_subplot()
    values = [[table[quality][name] for quality in table] for name in HEURISTICS] if table else []
    if values:
        cells = [[float("nan") if value is None else value for value in row] for row in values]
        image = axes.imshow(cells, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        figure.colorbar(image, label="Pearson's r")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                text = "-" if value is None else f"{value:+.2f}"
                colour = "white" if abs(value or 0.0) > _DARK else "black"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(table)), [name.replace("_", "\n") for name in table], fontsize=8)
        axes.set_yticks(range(len(HEURISTICS)), [name.replace("_", " ") for name in HEURISTICS], fontsize=8)
        axes.set_title(f"over {found['tasks']} tasks; by chance one in twenty beyond {found['chance']:.2f}")
    else:
        axes.set_title(f"{found['tasks']} tasks are too few for correlations")
    figure.savefig(path)


def _figure(height_inches: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need the extra `report`: pip install 'lorafleet[report]'") from error
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(line: Line, lines: Sequence[Line]) -> str:
    parts = [f"{line.task} ({line.metric})"]
    if len({other.base for other in lines}) > 1:
        parts.append(line.base)
    if len({other.recipe for other in lines}) > 1:
        parts.append(line.recipe)
    return " / ".join(parts)
