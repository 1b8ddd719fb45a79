"""Appendix F, Figure 8: where the orthogonal matrix sits in a convolution's kernel.

Command: python -m experiments sweep appendix_f
Hardware: any. Time: seconds.
Expected: all non-zeros at the center tap, further weights unmasked at zero over all taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.config import Kernel
from experiments.reporting.figures import Figure
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Table, Value
from experiments.studies.measure import draw_kernel


def get_config() -> Kernel:
    """Return the kernel that is drawn."""
    return Kernel(experiment="appendix_f")


def sweep() -> list[Kernel]:
    """Return the kernel that is drawn."""
    return [get_config()]


def quick() -> list[Kernel]:
    """Return a smaller one."""
    return [Kernel(experiment="appendix_f", channels=4, density=0.3)]


def report(rows: Rows) -> Items:
    """Count weights by tap; draw kernel and mask."""
    [kernel] = {
        Kernel(row["experiment"], row["channels"], row["taps"], row["density"], row["seed"])
        for row in rows
    }
    weights, mask = draw_kernel(kernel)
    caption = (
        f"A {kernel.taps} × {kernel.taps} kernel of {kernel.channels} inputs and outputs, density "
        f"{kernel.density:g}, seed {kernel.seed}. Gray: unmasked, and zero at the start."
    )
    shown = [{**row, "seed": None, "tap": str(tuple(row["tap"]))} for row in rows if "tap" in row]
    table = Table(
        "appendix_f",
        "Weights of a convolution at each tap",
        caption,
        shown,
        (
            Value("nonzeros", "non-zero at the start", fmt=".0f", exact=True),
            Value("unmasked", "unmasked", fmt=".0f", exact=True),
        ),
        ("tap",),
    )
    panels = tuple(_panel(weights[tap], mask[tap], tap) for tap in np.ndindex(*weights.shape[:2]))
    title = "One kernel, tap by tap: outputs against inputs"
    return [table, Figure("appendix_f_kernel", title, caption, panels, kernel.taps, (2.6, 2.6))]


def _panel(weights: Any, mask: Any, tap: tuple[int, ...]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        axes.imshow(np.where(mask, 0.5, np.nan), cmap="gray", vmin=0, vmax=0.7)
        shown = np.where(weights == 0, np.nan, weights)
        axes.imshow(shown, cmap="PuOr", vmin=-1, vmax=1)
        axes.set(title=f"tap {tap}", xlabel="output", ylabel="input", xticks=[], yticks=[])

    return draw
