"""Table 3: ResNet-32 and VGG-16 with tanh, leaky ReLU and SELU on CIFAR-10, density 0.1.

Command: python -m experiments sweep table3 --scale small
Hardware: one GPU; the small scale, one epoch of ResNet-20, for two CPU cores. Time: there three to
ten minutes a run on one core.
Expected: EOI best for most activations and criteria. At the small scale EOI behind Base, and with
spread taps and He's norms level with it.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table2
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows


def get_config() -> Train:
    """Return one run of the table: ResNet-32 with tanh, EOI on ERK densities."""
    return dataclasses.replace(table2.get_config(), experiment="table3", activation="tanh")


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    return grids.product_with_dense(
        get_config(),
        model=("resnet32", "vgg16"),
        activation=("tanh", "leaky_relu", "selu"),
        seeds=grids.SEEDS,
        criterion=grids.CRITERIA,
        method=grids.METHODS,
    )


def small() -> list[Train]:
    """Return one epoch of ResNet-20, ERK, the first seed."""
    base = dataclasses.replace(get_config(), model="resnet20", epochs=1)
    names, activations = ("base", "eoi", "spread_he"), ("tanh", "leaky_relu", "selu")
    return grids.product_of_starts(base, names, activation=activations)


def quick() -> list[Train]:
    """Return a small perceptron with SELU, on synthetic data."""
    return [grids.tiny("table3", activation="selu", batch_size=64, method="base")]


def report(rows: Rows) -> Items:
    """Tabulate the accuracy."""
    table = grids.table_of_runs(
        "table3",
        "Other activations on CIFAR-10 (JPEG), density 0.1",
        rows,
        "200 epochs of ResNet-32 and VGG-16, all criteria, seeds 1 to 5",
        ("model", "activation", "criterion", "variant"),
        group=("model", "activation"),
    )
    return [table]
