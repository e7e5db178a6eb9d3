"""The table as a picture: base and adapter of each run, with the interval of the lift."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafleet.experiment.table import Line

_INCHES_PER_LINE = 0.32
_WIDTH_INCHES = 8.0
_BASE_COLOUR = "#9aa5b1"
_ADAPTER_COLOUR = "#1f6feb"


class PlotError(Exception):
    """The picture cannot be drawn."""


def write_plot(name: str, lines: Sequence[Line], path: Path) -> None:
    """Draw the runs that were scored to `path`, in the format of its suffix.

    Raises:
        PlotError: the plotting library is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need the extra `report`: pip install 'lorafleet[report]'") from error
    scored = [line for line in lines if line.lift is not None][::-1]
    figure = Figure(figsize=(_WIDTH_INCHES, 1.2 + _INCHES_PER_LINE * len(scored)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for height, line in enumerate(scored):
        base, adapter = line.base_score or 0.0, line.adapter_score or 0.0
        axes.plot([base, adapter], [height, height], color=_ADAPTER_COLOUR, alpha=0.35, linewidth=2)
        axes.plot(base, height, "o", color=_BASE_COLOUR, label="base" if height == 0 else None)
        low, high = base + (line.lift_low or 0.0), base + (line.lift_high or 0.0)
        axes.errorbar(
            adapter,
            height,
            xerr=[[max(0.0, adapter - low)], [max(0.0, high - adapter)]],
            fmt="o",
            color=_ADAPTER_COLOUR,
            capsize=3,
            label="adapter, with the lift's 95 % interval" if height == 0 else None,
        )
    axes.set_yticks(range(len(scored)), [_label(line, scored) for line in scored])
    axes.set_xlabel("score on the test rows")
    axes.set_title(name)
    axes.grid(axis="x", alpha=0.3)
    if scored:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18 if len(scored) < 8 else -0.06), ncols=2)
    figure.savefig(path)


def _label(line: Line, lines: Sequence[Line]) -> str:
    parts = [f"{line.task} ({line.metric})"]
    if len({other.base for other in lines}) > 1:
        parts.append(line.base)
    if len({other.recipe for other in lines}) > 1:
        parts.append(line.recipe)
    return " / ".join(parts)
