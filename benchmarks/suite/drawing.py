"""Plots as SVG, drawn by matplotlib.

Each file says what it was made of, so that a check need not draw it again: another matplotlib draws other bytes. Only
drawing imports it, so that measuring and comparing do without.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from harness.result import ResultError

from suite.plots import Bars, Lines, Plot, digest
from suite.table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raygym",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MET, _MISSED = "#2a7f62", "#c0392b"
_FAR = (0.25, 8.0)
"""Bars of ratios to a goal end here."""
_OF = re.compile(r"of ([0-9a-f]{64})")


def drawn_of(svg: str) -> str | None:
    """The digest of the plot that an SVG was made of; None if it is none of ours."""
    found = _OF.search(svg)
    return found[1] if found else None


def draw(plot: Plot) -> str:
    """The SVG.

    Raises:
        ResultError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResultError(
            f"the plots are drawn by matplotlib, which cannot be imported ({error}); run `make setup`"
        ) from None
    with rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are literals
        height = 0.9 + 0.23 * len(plot.bars) if isinstance(plot, Bars) else 3.0
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(plot.title, fontsize=10, loc="left")
        if isinstance(plot, Bars):
            _draw_bars(axes, plot)
        else:
            _draw_lines(axes, plot)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Description": f"of {digest(plot)}"})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _draw_bars(axes: Axes, plot: Bars) -> None:
    names = [name for name, _ in plot.bars]
    ends = [min(max(share, _FAR[0]), _FAR[1]) for _, share in plot.bars]
    colours = [_MET if share >= 1 else _MISSED for _, share in plot.bars]
    axes.barh(names, [end - 1 for end in ends], left=1, color=colours, height=0.6)
    for place, (end, (_, share)) in enumerate(zip(ends, plot.bars, strict=True)):
        far, beside = ("left", 3) if share >= 1 else ("right", -3)
        axes.annotate(
            number(share), (end, place), (beside, 0), textcoords="offset points", ha=far, va="center", fontsize=7
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    # Left of the shortest bar its figure needs room, and right of the longest it may stand outside.
    axes.set_xlim(_FAR[0] / 1.6, _FAR[1])
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8 or more"])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7.5)


def _draw_lines(axes: Axes, plot: Lines) -> None:
    for series in plot.series:
        x, y, low, high = zip(*series.points, strict=True)
        below = [value - least for value, least in zip(y, low, strict=True)]
        above = [most - value for value, most in zip(y, high, strict=True)]
        axes.errorbar(x, y, yerr=(below, above), marker="o", markersize=4, capsize=3, label=series.label)
    axes.set_xscale("log", base=2)
    places = sorted({point[0] for series in plot.series for point in series.points})
    axes.set_xticks(places, [f"{place:,.0f}" for place in places])
    axes.minorticks_off()
    # The margin above is a part of the whole height: of lines that hardly change it would be none otherwise.
    axes.update_datalim([(places[0], 0)])
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(axis="y", alpha=0.3)
    if len(plot.series) > 1:
        axes.legend(frameon=False)
