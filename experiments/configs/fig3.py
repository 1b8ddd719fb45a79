"""Figure 3: singular values of MLP-7's input-output Jacobian at the start, against density.

Command: python -m experiments sweep fig3 --scale small
Hardware: two CPU cores. Time: 37 minutes at the small scale, most of it for SynFlow's masks and
AI's descent; the paper's grid, with 15 times as much AI, was not timed.
Expected: without an activation, every singular value of EOI is 1 at every density, while those of
Base vanish as the density falls, and the mean of AI falls below a density of 0.2. With tanh and
hard tanh the order is the same; with ReLU EOI's lead over AI is larger.
"""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes

from experiments.config import Spectrum
from experiments.reporting.figures import Curves, Figure
from experiments.reporting.grids import CRITERIA, NAMES, Items, Rows, product, with_start_names
from experiments.reporting.tables import Table, Value, label

ACTIVATIONS = ("identity", "tanh", "hard_tanh", "relu")
DENSITIES = (0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
AI_DENSITIES = (0.03, 0.05, 0.1, 0.2)
SHOWN = (*AI_DENSITIES, 0.5, 1.0)  # in the table; the figures have all
STATISTICS = {"mean": "mean", "max": "largest", "min": "smallest", "std": "standard deviation"}


def get_config() -> Spectrum:
    """Return the start that the figure is about: EOI on ERK densities."""
    return Spectrum(experiment="fig3", activation="tanh", density=0.05, seeds=(1, 2, 3, 4, 5))


def sweep() -> list[Spectrum]:
    """Return all starts of the paper's figure."""
    return product(
        get_config(),
        activation=ACTIVATIONS,
        criterion=CRITERIA,
        method=("base", "eoi", "ai"),
        density=DENSITIES,
    )


def small() -> list[Spectrum]:
    """Return the same with AI for ERK at four densities only."""
    return [
        start
        for start in sweep()
        if start.method != "ai"
        or (start.criterion == "erdos_renyi_kernel" and start.density in AI_DENSITIES)
    ]


def quick() -> list[Spectrum]:
    """Return two starts on synthetic data."""
    linear = Spectrum(
        experiment="fig3",
        activation="identity",
        data="made",
        depth=3,
        width=20,
        ai_steps=5,
        density=0.2,
    )
    return product(linear, method=("eoi", "ai"))


def report(rows: Rows) -> Items:
    """Tabulate and draw the statistics for ERK; draw the means for all criteria."""
    rows = with_start_names(rows)
    erk = [row for row in rows if row["criterion"] == "erdos_renyi_kernel"]
    caption = (
        "MLP-7 at the start, 128 MNIST images, all 1280 singular values of their Jacobians pooled, "
        "seeds 1 to 5; AI takes 10 000 steps. Densities as in the paper."
    )
    linear = Table(
        "fig3",
        "Singular values of MLP-7 at the start, ERK",
        caption,
        [row for row in erk if row["density"] in SHOWN],
        (Value("spectrum_mean", "mean singular value", fmt=".3g"),),
        ("activation", "density"),
        "method",
        names=NAMES,
        order={"method": ("base", "ai", "eoi")},
    )
    figures = []
    for key, word in STATISTICS.items():
        panels = tuple(_panel(erk, activation, key, word) for activation in ACTIVATIONS)
        title = f"Singular values of MLP-7, ERK: {word}"
        figures.append(Figure(f"fig3_{key}", title, caption, panels, across=2, share=True))
    starts = ["ERK EOI", *(f"{label(criterion, NAMES)} Base" for criterion in CRITERIA)]
    panels = tuple(
        Curves(
            [row for row in rows if row["activation"] == activation and row["start"] in starts],
            "density",
            "spectrum_mean",
            "start",
            "density",
            "mean singular value",
            label(activation, NAMES),
            yscale="log",
            order=starts,
        )
        for activation in ACTIVATIONS
    )
    title = "Singular values of MLP-7, the masks of all criteria, and EOI: mean"
    figures.append(Figure("fig3_criteria", title, caption, panels, across=2, share=True))
    return [linear, *figures]


def _panel(rows: Rows, activation: str, key: str, word: str) -> Callable[[Axes], None]:
    """Draw one statistic of one activation; what is below 1e-9 is below the picture."""
    curves = Curves(
        [row for row in rows if row["activation"] == activation],
        "density",
        f"spectrum_{key}",
        "method",
        "density",
        f"{word} of the singular values",
        label(activation, NAMES),
        yscale="linear" if key == "std" else "log",
        names=NAMES,
        order=("eoi", "base", "ai"),
    )

    def draw(axes: Axes) -> None:
        curves(axes)
        if key == "min":
            axes.set_ylim(1e-9, 3)

    return draw
