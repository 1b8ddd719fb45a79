"""Appendix B, Figure 5: time to draw one matrix against its size and its density.

Command: python -m experiments sweep appendix_b
Hardware: a quiet machine. Time: five minutes on two CPU cores.
Expected: EOI below QR everywhere; SAO below EOI at low densities from size 512 on. The
paper's own code has SAO ahead from size 2048 on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from experiments.config import Times
from experiments.reporting.figures import Curves, Figure
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Table, Value

SIZES = (128, 256, 512, 1024, 2048, 4096)
DENSITIES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
NAMES = {"QR": "dense orthogonal (QR)", "AI": "one step of AI (the paper takes 10 000)"}


def get_config() -> Times:
    """Return one size with all densities."""
    return Times(experiment="appendix_b", densities=DENSITIES)


def sweep() -> list[Times]:
    """Return all sizes."""
    return [Times(experiment="appendix_b", size=size, densities=DENSITIES) for size in SIZES]


def quick() -> list[Times]:
    """Return one small size."""
    return [Times(experiment="appendix_b", size=16, densities=(1 / 4,), repeats=1)]


def report(rows: Rows) -> Items:
    """Tabulate milliseconds; draw both cuts of the paper's figure."""
    rows = [
        {**row, "density": row.get("density"), "method": row.get("method")}
        for row in rows
        if row.get("seconds") is not None
    ]
    machine = " or ".join(dict.fromkeys(row["machine"] for row in rows))
    caption = f"Medians of 5 runs, 3 at size 4096 and of AI, in turns. {machine}."
    table = Table(
        "appendix_b",
        "Time to draw one matrix",
        caption,
        rows,
        (Value("seconds", "milliseconds", 1e3, ".3g", exact=True),),
        ("size", "density"),
        "method",
        names={"QR": "dense (QR)", "AI": "one step of AI"},
        order={"method": ("EOI", "SAO", "QR", "AI")},
    )
    sizes = sorted({row["size"] for row in rows})
    middle = max((size for size in sizes if size <= 1024), default=0)
    densities = sorted({row["density"] for row in rows})
    at = min(densities, key=lambda density: abs(density - 1 / 8), default=0.0)
    panels = (
        _panel(rows, "density", at, "size", "size n of an n × n matrix", sizes),
        _panel(rows, "size", middle, "density", "density (fraction of non-zeros)", densities),
    )
    return [
        table,
        Figure("appendix_b_times", "Time to draw one matrix", caption, panels, share=True),
    ]


def _panel(
    rows: Rows, fixed: str, value: float, x: str, xlabel: str, ticks: Sequence[float]
) -> Callable[[Axes], None]:
    """Draw time against one field, the other one fixed."""
    curves = Curves(
        [row for row in rows if row[fixed] == value],
        x,
        "seconds",
        "method",
        xlabel,
        "seconds",
        f"{fixed} {value:g}",
        xscale="log",
        yscale="log",
        names=NAMES,
        order=("EOI", "QR", "SAO", "AI"),
    )

    def draw(axes: Axes) -> None:
        curves(axes)
        axes.set_xticks(ticks, [f"{t:g}" if t >= 1 else f"1/{1 / t:g}" for t in ticks])
        axes.minorticks_off()

    return draw
