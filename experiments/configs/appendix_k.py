"""Appendix K, Figure 13: the price of sparsity, ResNet-56 on CIFAR-10 over densities.

Command: python -m experiments sweep appendix_k --scale small
Hardware: one GPU; the small scale, one epoch of ResNet-20, for two CPU cores. Time: there six
minutes a run on one core.
Expected: EOI best at every density, most at the lowest; at the small scale behind Base at each, and
level with it with spread taps and He's norms.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table2
from experiments.reporting import grids
from experiments.reporting.figures import Curves, Figure
from experiments.reporting.grids import Items, Rows

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
SMALL_DENSITIES = (0.05, 0.2, 0.5)


def get_config() -> Train:
    """Return the run that the figure is about: EOI on ERK densities."""
    return dataclasses.replace(
        table2.get_config(), experiment="appendix_k", model="resnet56", density=0.05
    )


def sweep() -> list[Train]:
    """Return all densities and starts."""
    return grids.product_with_dense(
        get_config(), seeds=grids.SEEDS, density=DENSITIES, method=grids.METHODS
    )


def small() -> list[Train]:
    """Return one epoch of ResNet-20, the first seed; appendix_i has density 0.1."""
    base = dataclasses.replace(get_config(), model="resnet20", epochs=1)
    return grids.product_of_starts(base, ("base", "eoi", "spread_he"), density=SMALL_DENSITIES)


def quick() -> list[Train]:
    """Return a small perceptron at two densities, on synthetic data."""
    return grids.product(grids.tiny("appendix_k", method="base"), density=(0.1, 0.3))


def report(rows: Rows) -> Items:
    """Tabulate and draw the accuracy."""
    title = "The price of sparsity on CIFAR-10 (JPEG)"
    table = grids.table_of_runs(
        "appendix_k",
        title,
        rows,
        "200 epochs of ResNet-56, seeds 1 to 5",
        ("model", "start"),
        "density",
    )
    accuracy = grids.ACCURACY
    fields = ("density", accuracy.key, "start", "density", accuracy.name)
    panel = Curves(table.rows, *fields, scale=accuracy.scale, xscale="log")
    return [table, Figure("appendix_k_accuracy", title, table.caption, (panel,), size=(6, 4))]
