"""Table 1, left: a plain 1000-layer tanh MLP on MNIST with an eighth of its weights.

Command: python -m experiments sweep table1_mlp1000 --scale small
Hardware: two CPU cores. Time: 2.5 to 4 minutes an epoch on one core; AI 4 to 6 more a seed. The
small scale, two epochs for ERK and one for other criteria, two hours; the paper's, weeks.
Expected: dense orthogonal, EOI and AI learn, EOI within reach of dense; Base stays at chance.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value

PAPER = "100 epochs, learning rate 0.0001, seeds 1 to 5"
TEST_LOSS = Value("test_loss", "test loss", fmt=".3f", best="lowest")


def get_config() -> Train:
    """Return the run that the table is about: EOI on ERK densities."""
    return Train(
        experiment="table1_mlp1000",
        model="mlp1000",
        density=0.125,
        scale=1.0247,
        bias_std=0.00448,
        ai_steps=1000,
        epochs=100,
        learning_rate=1e-4,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    return [
        *grids.product_with_dense(
            get_config(), seeds=grids.SEEDS, criterion=grids.CRITERIA, method=grids.METHODS
        ),
        *grids.product(get_config(), seeds=grids.SEEDS, method=("sao",)),
    ]


def small() -> list[Train]:
    """Return what two CPU cores reach: two epochs for ERK, then one for the other criteria."""
    two, one = grids.product(get_config(), epochs=(2, 1), learning_rate=(5e-4,))
    others = tuple(criterion for criterion in grids.CRITERIA if criterion != "erdos_renyi_kernel")
    grid = []
    for seed in (1, 2, 3):
        erk = dataclasses.replace(two, seeds=(seed,))
        grid += grids.product_with_dense(erk, method=("eoi", "base", "ai", "sao"))
    return grid + grids.product(one, criterion=others, method=("base", "eoi"))


def quick() -> list[Train]:
    """Return five-layer networks on synthetic data, from starts that other tables leave out."""
    start = Train(
        experiment="table1_mlp1000",
        model="mlp1000",
        depth=5,
        width=16,
        data="made",
        density=0.25,
        scale=1.0247,
        bias_std=0.00448,
        ai_steps=5,
        batch_size=64,
    )
    return grids.product_with_dense(start, method=("sao",))


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    table = grids.table_of_runs(
        "table1_mlp1000",
        "MLP-1000 on MNIST",
        rows,
        PAPER,
        ("epochs", "criterion", "method"),
        about="1000 layers of width 128, tanh, density 0.125.",
        values=(
            grids.ACCURACY,
            TEST_LOSS,
            Value("spectrum_mean", "mean singular value at the start", fmt=".2g"),
        ),
        group=("epochs",),
        order={"epochs": (100, 2, 1), "method": ("dense", "eoi", "ai", "base", "sao")},
    )
    longest = max(row["epochs"] for row in rows)
    figure = grids.loss_figure(
        "table1_mlp1000",
        "Training loss of MLP-1000",
        table.caption,
        [row for row in curves if row["epochs"] == longest],
        order=("dense", "ERK EOI", "ERK AI", "ERK Base", "SAO"),
    )
    return [table, figure]
