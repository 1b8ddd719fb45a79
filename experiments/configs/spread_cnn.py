"""Plain tanh CNNs of 100 and 1000 layers: all taps and matchings against the center tap.

With circular padding, a kernel at one tap and a kernel with its rows spread over all taps are both
exactly isometric, but only the second uses more than one pixel.

Command: python -m experiments sweep spread_cnn --scale small
Hardware: two CPU cores. Time: ten minutes a run of 100 layers on one core, 25 one of 1000 layers.
Expected: spread ahead of center by a point or two; of 100 layers dense ahead of both, at a quarter
of their rate.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table1_cnn1000, table1_mlp1000
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows

NAMES = ("eoi", "spread", "spread_matching", "dense")
ORDER = {
    "variant": ("dense", "EOI", "EOI, spread", "EOI, spread, matching", "AI"),
    "depth": (100, 1000),
}


def get_config() -> Train:
    """Return the run that the table is about: 1000 layers with spread taps."""
    return dataclasses.replace(
        table1_cnn1000.get_config(), experiment="spread_cnn", depth=1000, taps="spread"
    )


def sweep() -> list[Train]:
    """Return both depths at the paper's budget."""
    plain = dataclasses.replace(get_config(), taps="center")
    return grids.product_of_starts(plain, NAMES, depth=(100, 1000), seeds=grids.SEEDS)


def small() -> list[Train]:
    """Return networks of 16 channels: an epoch of 100 layers, half an epoch of 1000."""
    plain = dataclasses.replace(
        get_config(), taps="center", width=16, learning_rates=(4e-3, 1.6e-2, 6.4e-2)
    )
    shallow = dataclasses.replace(plain, depth=100, epochs=1)
    (deep,) = grids.product(plain, epochs=(0.5,), learning_rates=((),), learning_rate=(1e-3,))
    of_dense = {"learning_rates": (1e-3, 4e-3, 1.6e-2)}
    return [
        *grids.starts_of(shallow, NAMES, dense=of_dense),
        *grids.starts_of(deep, (*NAMES, "ai")),
    ]


def quick() -> list[Train]:
    """Return a network of four layers with spread taps, on synthetic data."""
    return [
        dataclasses.replace(run, experiment="spread_cnn", depth=4, taps="spread", planes="matching")
        for run in table1_cnn1000.quick()
    ]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    widths = " or ".join(str(w) for w in dict.fromkeys(row["width"] or 128 for row in rows))
    table = grids.table_of_runs(
        "spread_cnn",
        "Plain CNNs on CIFAR-10 (JPEG), taps and planes",
        rows,
        f"{table1_mlp1000.PAPER}, 1000 layers of 128 channels, center tap",
        ("depth", "epochs", "variant"),
        about=f"tanh, circular padding, {widths} channels, density 0.125 by ERK.",
        values=(
            grids.RATE,
            grids.ACCURACY,
            grids.TRAIN_LOSS,
        ),
        group=("depth",),
        order=ORDER,
    )
    figure = grids.loss_figure(
        "spread_cnn",
        "Training loss of plain CNNs",
        table.caption,
        curves,
        "depth",
        by="variant",
        order=ORDER["variant"],
    )
    return [table, figure]
