"""A plain 1000-layer tanh MLP on MNIST, each start at the best of three learning rates.

With an eighth of the weights, a step of the same rate changes a network less, so one rate for all
favors some starts. Here the rate of each start is chosen on validation images, and Base is in its
stronger variant, rescaled to the fan-in of its mask.

Command: python -m experiments sweep best_rates_mlp1000 --scale small
Hardware: two CPU cores. Time: five runs a start, each 5 to 8 minutes on one core.
Expected: open; at one shared rate the order is dense, SAO, EOI, AI, Base.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table1_mlp1000
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value

# Those in which the comparison is closest first: a sweep may be stopped.
NAMES = ("eoi", "matching", "dense", "rescaled", "hadamard", "sao", "smupar", "ai")
ORDER = {
    "variant": (
        *("dense", "rescaled Base", "SμPar", "AI", "SAO", "EOI", "EOI, matching"),
        "EOI, matching, Hadamard angles",
    )
}


def get_config() -> Train:
    """Return the run that the table is about: EOI with planes by matchings."""
    return dataclasses.replace(
        table1_mlp1000.get_config(),
        experiment="best_rates_mlp1000",
        planes="matching",
        seeds=(1, 2, 3, 4, 5),
        learning_rates=(1e-4, 2e-4, 4e-4),
    )


def sweep() -> list[Train]:
    """Return all starts at the paper's budget, at rates from the paper's up."""
    base = dataclasses.replace(get_config(), planes="independent")
    return grids.starts_of(base, NAMES, smupar={"learning_rates": (1.25e-5, 2.5e-5, 5e-5)})


def small() -> list[Train]:
    """Return two epochs of three seeds.

    Dense weights take lower rates than sparse ones; those of SμPar are multiplied by 8 where the
    mask is, to which its three amount.
    """
    base = dataclasses.replace(
        get_config(),
        planes="independent",
        seeds=(1, 2, 3),
        epochs=2,
        learning_rates=(1e-3, 2e-3, 4e-3),
    )
    return grids.starts_of(
        base,
        NAMES,
        dense={"learning_rates": (2.5e-4, 5e-4, 1e-3)},
        smupar={"learning_rates": (1.25e-4, 2.5e-4, 5e-4)},
    )


def quick() -> list[Train]:
    """Return a small perceptron with rescaled weights at the better of two rates."""
    return [
        grids.tiny("best_rates_mlp1000", method="rescaled", learning_rates=(0.01, 0.1)),
        grids.tiny("best_rates_mlp1000", planes="matching", angles="hadamard"),
    ]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    table = grids.table_of_runs(
        "best_rates_mlp1000",
        "MLP-1000 on MNIST, each start at its best learning rate",
        rows,
        "100 epochs, learning rate 0.0001 for all",
        ("variant",),
        about="1000 layers of width 128, tanh, density 0.125 by ERK.",
        values=(
            grids.RATE,
            grids.ACCURACY,
            table1_mlp1000.TEST_LOSS,
            grids.TRAIN_LOSS,
            Value("spectrum_mean", "mean singular value at the start", fmt=".2g"),
        ),
        order=ORDER,
    )
    figure = grids.loss_figure(
        "best_rates_mlp1000",
        "Training loss of MLP-1000, each start at its best rate",
        table.caption,
        curves,
        by="variant",
        order=ORDER["variant"],
    )
    return [table, figure]
