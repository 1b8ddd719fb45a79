"""Loss curves of MLP-7 on MNIST, from every start (beside Figure 3).

Command: python -m experiments sweep loss_curves
Hardware: two CPU cores. Time: about two days at the paper's 100 epochs; --scale small, three epochs
of ERK with tanh, three minutes on one core.
Expected: at a density of 0.05 EOI's loss falls first and furthest of the sparse starts. In three
epochs AI's loss falls equally far.
"""

from __future__ import annotations

from experiments.config import Train
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows

DENSITIES = (0.05, 0.1)
ACTIVATIONS = ("identity", "tanh", "hard_tanh", "relu")


def get_config() -> Train:
    """Return the run that the figure is about: EOI on ERK densities."""
    return Train(
        experiment="loss_curves",
        activation="tanh",
        density=0.05,
        epochs=100,
        learning_rate=0.01,
        seeds=(1, 2, 3, 4, 5),
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's figure."""
    return grids.product_with_dense(
        get_config(),
        activation=ACTIVATIONS,
        criterion=grids.CRITERIA,
        method=grids.METHODS,
        density=DENSITIES,
    )


def small() -> list[Train]:
    """Return three epochs of ERK with tanh."""
    return grids.product_with_dense(
        get_config(), epochs=(3,), method=grids.METHODS, density=DENSITIES
    )


def quick() -> list[Train]:
    """Return a tiny run of two seeds on synthetic data."""
    fields = {"activation": "tanh", "density": 0.1, "batch_size": 64, "seeds": (1, 2)}
    return [grids.tiny("loss_curves", method="base", **fields)]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    table = grids.table_of_runs(
        "loss_curves",
        "MLP-7 on MNIST",
        rows,
        "100 epochs, all criteria, seeds 1 to 5",
        ("activation", "start"),
        "density",
        group=("activation",),
    )
    of, title = ("activation", "density"), "Training loss of MLP-7"
    figure = grids.loss_figure("loss_curves", title, table.caption, curves, *of, yscale="log")
    return [table, figure]
