"""Figures of repeated runs: curves of means with their standard deviations."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from experiments.reporting.tables import collect, label, ordered
from experiments.runs import Row

__all__ = ["COLORS", "Curves", "Figure"]

# Okabe and Ito's and, as the last two, Tol's wine and a gray, told apart by color-blind readers;
# markers and dashes tell them apart in gray.
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"),
    *("#882255", "#999999"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)))
# On a logarithmic axis so many points are labelled each, in place of the powers of ten.
_TICKS = 6


@dataclasses.dataclass(frozen=True)
class Curves:
    """A panel: a field against another one, a curve for each value of a third.

    Attributes:
        rows: of any number; those without the two fields draw nothing.
        x: field of the horizontal axis.
        y: field of the vertical axis, averaged over the rows of one ``x`` and curve.
        by: field of which each value that occurs is a curve.
        xlabel: name and unit of the horizontal axis.
        ylabel: name and unit of the vertical axis.
        title: of the panel.
        scale: factor of ``y``, such as 100 for percent.
        spread: standard deviations as bars or as a band, or none.
        markers: whether points are marked; leave them out where there are many.
        xscale: of the horizontal axis.
        yscale: of the vertical axis.
        names: how values of ``by`` are called, where not by themselves.
        order: values of ``by`` that come first. With the same order, panels have the same colors.
    """

    rows: Sequence[Row] = dataclasses.field(repr=False)
    x: str
    y: str
    by: str
    xlabel: str
    ylabel: str
    title: str = ""
    scale: float = 1.0
    spread: Literal["bars", "band", "none"] = "bars"
    markers: bool = True
    xscale: Literal["linear", "log", "symlog"] = "linear"
    yscale: Literal["linear", "log", "symlog"] = "linear"
    names: Mapping[Any, str] = dataclasses.field(default_factory=dict)
    order: Sequence[Any] = ()

    def __call__(self, axes: Axes) -> None:
        """Draw on axes."""
        plotted = [row for row in self.rows if row.get(self.x) is not None]
        cells = collect(plotted, self.y, lambda row: (row.get(self.by), row[self.x]))
        # A curve that did not run keeps its color free, and so does one that another panel has.
        values = [*self.order, *ordered(row.get(self.by) for row in self.rows)]
        for index, value in enumerate(ordered(values)):
            points = sorted((x, cell) for (curve, x), cell in cells.items() if curve == value)
            if not points:
                continue
            x = np.array([x for x, _ in points])
            mean = self.scale * np.array([cell.mean for _, cell in points])
            deviation = self.scale * np.array([cell.deviation for _, cell in points])
            color = COLORS[index % len(COLORS)]
            style: dict[str, Any] = {
                "color": color,
                # A tenth line has the first's color, and another dash.
                "linestyle": DASHES[(index + index // len(COLORS)) % len(DASHES)],
                "marker": MARKERS[index % len(MARKERS)] if self.markers else None,
                "label": label(value, self.names),
            }
            if self.spread == "bars":
                # One run has no deviation: its point has no bar.
                axes.errorbar(x, mean, np.nan_to_num(deviation), capsize=3, **style)
            else:
                axes.plot(x, mean, **style)
            if self.spread == "band":
                axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2)
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, title=self.title)
        axes.set(xscale=self.xscale, yscale=self.yscale)
        measured = sorted({x for _, x in cells})
        if self.xscale == "log" and 0 < len(measured) <= _TICKS:
            axes.set_xticks(measured, [label(x, {}) for x in measured])
            axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of one or more panels with one legend.

    Attributes:
        name: short, unique among all reports; that of the file.
        title: of a few words.
        caption: settings, seeds, data and whatever is smaller than in the original.
        panels: functions that draw on their axes, as :class:`Curves` are.
        across: panels side by side.
        size: width and height of a panel in inches.
        share: whether panels have the same vertical axis.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Callable[[Axes], None], ...] = dataclasses.field(repr=False)
    across: int = 3
    size: tuple[float, float] = (4.4, 3.6)
    share: bool = False

    def draw(self) -> Canvas:
        """Draw the figure, with matplotlib's own class; no backend is chosen."""
        across = min(self.across, len(self.panels))
        down = -(-len(self.panels) // across)
        # No pyplot: it would keep every figure, and choose a backend.
        canvas = Canvas(
            figsize=(across * self.size[0], down * self.size[1] + 0.5), layout="constrained"
        )
        axes = canvas.subplots(down, across, sharey=self.share, squeeze=False).ravel()
        handles = {}
        for panel, draw in zip(axes, self.panels, strict=False):
            draw(panel)
            drawn = zip(*panel.get_legend_handles_labels(), strict=True)
            handles.update({name: handle for handle, name in drawn if name not in handles})
        for panel in axes[len(self.panels) :]:
            panel.set_axis_off()
        if handles:
            for columns in range(min(4, len(handles)), 0, -1):
                legend = canvas.legend(
                    list(handles.values()),
                    list(handles),
                    loc="outside lower center",
                    ncols=columns,
                )
                if columns == 1 or legend.get_window_extent().width <= canvas.bbox.width:
                    break
                legend.remove()
        canvas.suptitle(self.title)
        return canvas

    def png(self, dpi: int = 120) -> bytes:
        r"""Draw the figure."""
        file = io.BytesIO()
        self.draw().savefig(file, format="png", dpi=dpi, metadata={"Software": None})
        return file.getvalue()
