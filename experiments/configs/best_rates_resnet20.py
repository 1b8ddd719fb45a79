"""ResNet-20 on CIFAR-10, each sparse start at the best of three learning rates.

Early in training the paper's method is behind masked He weights on residual networks with batch
normalization, for two reasons: the effective learning rate of a kernel falls with its norm, and a
kernel with one tap uses only one pixel. Here starts with spread taps, and with the Frobenius norm
of He weights, are compared with both variants of Base.

Command: python -m experiments sweep best_rates_resnet20 --scale small
Hardware: two CPU cores. Time: at the small scale five runs a start, each three to ten minutes on
one core.
Expected: after one epoch the paper's start is behind Base, by ten points in the mean of three
seeds, and the start with spread taps and He's norms is within one point.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table2
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows

# Those in which the comparison is closest first: a sweep may be stopped.
NAMES = (
    *("base", "spread_he", "spread_matching_he", "eoi", "rescaled", "spread", "ai"),
    "spread_matching",
)
LONG = ("base", "spread_he", "spread_matching_he")
ORDER = {
    "variant": (
        *("dense", "Base", "rescaled Base", "AI", "EOI", "EOI, spread", "EOI, spread, matching"),
        *("EOI, spread, He norm", "EOI, spread, matching, He norm"),
    ),
    "epochs": (1, 10, 200),
}


def get_config() -> Train:
    """Return the run that the table is about: EOI with spread taps and He's norms."""
    return dataclasses.replace(
        table2.get_config(),
        experiment="best_rates_resnet20",
        model="resnet20",
        taps="spread",
        he_norm=True,
        seeds=(1, 2, 3),
        learning_rates=(0.03, 0.1, 0.3),
    )


def _grid(base: Train, names: tuple[str, ...]) -> list[Train]:
    plain = dataclasses.replace(base, taps="center", he_norm=False)
    found = grids.starts_of(plain, names)
    if base.density == 0.1:  # once
        found.insert(len(found) // 2, *grids.starts_of(plain, ("dense",)))
    return found


def sweep() -> list[Train]:
    """Return all starts at the paper's budget."""
    return [
        run
        for base in grids.product(get_config(), density=(0.1, 0.05))
        for run in _grid(base, NAMES)
    ]


def small() -> list[Train]:
    """Return one epoch of three seeds at two densities, then ten epochs of three starts."""
    one = grids.product(get_config(), epochs=(1,), density=(0.1, 0.05))
    (ten,) = grids.product(get_config(), epochs=(10,), seeds=((1,),))
    plain = dataclasses.replace(ten, taps="center", he_norm=False)
    return [
        *(run for base in one for run in _grid(base, NAMES)),
        *(
            dataclasses.replace(run, learning_rates=(), learning_rate=0.1)
            for run in grids.starts_of(plain, LONG)
        ),
    ]


def quick() -> list[Train]:
    """Return a small perceptron with He's norms, on synthetic data."""
    return [grids.tiny("best_rates_resnet20", he_norm=True)]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss of the shorter runs."""
    table = grids.table_of_runs(
        "best_rates_resnet20",
        "ResNet-20 on CIFAR-10 (JPEG), each start at its best learning rate",
        rows,
        "ResNet-32 and larger, 200 epochs, learning rate 0.1 for all",
        ("epochs", "density", "variant"),
        about="ERK.",
        values=(
            grids.RATE,
            grids.ACCURACY,
            dataclasses.replace(grids.ACCURACY, key="validation_accuracy", name="validation (%)"),
        ),
        group=("epochs", "density"),
        order=ORDER,
    )
    shortest = min((row["epochs"] for row in curves), default=0)
    figure = grids.loss_figure(
        "best_rates_resnet20",
        "Training loss of ResNet-20, each start at its best rate",
        table.caption,
        [row for row in curves if row["epochs"] == shortest],
        "density",
        by="variant",
        order=ORDER["variant"],
    )
    return [table, figure]
