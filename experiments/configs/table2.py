"""Table 2 and Figure 4: ResNets and VGG-16 on CIFAR-10, all sparse starts.

Command: python -m experiments sweep table2 --scale small
Hardware: made for GPUs; the small scale, two epochs of ResNet-32, for two CPU cores. Time: there
half an hour a start on one core.
Expected: EOI best in nearly every column, by half a percent to three, most at a density of 0.05.
Two epochs do not show final accuracies.
"""

from __future__ import annotations

from experiments.config import Train
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows

MODELS = ("resnet32", "resnet56", "resnet110", "vgg16")


def get_config() -> Train:
    """Return the run that the table is about: ResNet-32, EOI on ERK densities."""
    return Train(
        experiment="table2",
        model="resnet32",
        data="cifar10",
        init="fan_in",
        density=0.1,
        epochs=200,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    return grids.product_with_dense(
        get_config(),
        model=MODELS,
        seeds=grids.SEEDS,
        criterion=grids.CRITERIA,
        method=grids.METHODS,
        density=(0.05, 0.1),
    )


def small() -> list[Train]:
    """Return two epochs of ResNet-32, ERK; a density of 0.05 last."""
    return grids.product_with_dense(
        get_config(), epochs=(2,), density=(0.1, 0.05), method=("eoi", "base", "ai")
    )


def quick() -> list[Train]:
    """Return the smallest residual network on synthetic data."""
    return [
        Train(
            experiment="table2",
            model="resnet32",
            method="base",
            depth=8,
            width=4,
            data="made",
            init="fan_in",
            density=0.3,
            batch_size=64,
        )
    ]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    table = grids.table_of_runs(
        "table2",
        "Residual networks and VGG-16 on CIFAR-10 (JPEG)",
        rows,
        "200 epochs, all networks and criteria, seeds 1 to 5",
        ("model", "density", "criterion", "method"),
        group=("model", "density"),
    )
    title, order = "Training loss on CIFAR-10 (JPEG)", ("dense", "ERK EOI", "ERK AI", "ERK Base")
    figure = grids.loss_figure(
        "table2", title, table.caption, curves, "model", "density", order=order
    )
    return [table, figure]
