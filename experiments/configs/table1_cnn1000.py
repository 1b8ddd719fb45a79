"""Table 1, right: a plain 1000-layer tanh CNN on CIFAR-10 with an eighth of its weights.

Command: python -m experiments sweep table1_cnn1000 --scale small
Hardware: made for GPUs; the small scale, 8 channels and half an epoch, for two CPU cores.
Time: there ten minutes a start on one core.
Expected: dense delta-orthogonal and EOI learn, AI less, Base stays at chance. The paper: EOI about
78 %, AI below 40 %. At the small scale dense weights learn and EOI hardly begins to.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table1_mlp1000
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows


def get_config() -> Train:
    """Return the run that the table is about: EOI on ERK densities."""
    return dataclasses.replace(
        table1_mlp1000.get_config(), experiment="table1_cnn1000", model="cnn1000", data="cifar10"
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    methods = (*grids.METHODS, "eis")
    return [
        *grids.product_with_dense(
            get_config(), seeds=grids.SEEDS, criterion=grids.CRITERIA, method=methods
        ),
        *grids.product(get_config(), seeds=grids.SEEDS, method=("sao",)),
    ]


def small() -> list[Train]:
    """Return the network of 8 channels, half an epoch, ERK only."""
    narrow = dataclasses.replace(get_config(), width=8, epochs=0.5, learning_rate=5e-4)
    return grids.product_with_dense(narrow, method=("eoi", "base", "ai"))


def quick() -> list[Train]:
    """Return a network of six layers on synthetic data."""
    return [
        Train(
            experiment="table1_cnn1000",
            model="cnn1000",
            depth=6,
            width=8,
            data="made",
            density=0.25,
            scale=1.0247,
            bias_std=0.00448,
            batch_size=64,
        )
    ]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    widths = dict.fromkeys(128 if row["width"] is None else row["width"] for row in rows)
    table = grids.table_of_runs(
        "table1_cnn1000",
        "CNN-1000 on CIFAR-10 (JPEG)",
        rows,
        table1_mlp1000.PAPER,
        ("criterion", "method"),
        about=f"1000 layers of {' or '.join(map(str, widths))} channels (the paper: 128), tanh, "
        "circular padding, density 0.125.",
        values=(grids.ACCURACY, table1_mlp1000.TEST_LOSS),
        order={"method": ("dense", "eoi", "ai", "base")},
    )
    title, order = "Training loss of CNN-1000", ("dense", "ERK EOI", "ERK AI", "ERK Base")
    figure = grids.loss_figure("table1_cnn1000", title, table.caption, curves, order=order)
    return [table, figure]
