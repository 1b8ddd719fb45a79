"""Appendix K, Figure 13: the price of sparsity, ResNet-56 on CIFAR-10 over densities.

Command: python -m experiments sweep appendix_k
Hardware: one GPU; no smaller scale has been run. Time: not measured.
Expected: EOI best at every density, most at the lowest.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import METHODS, NAMES, budget, named, product
from experiments.reporting.report import Curves, Figure, Table, Value
from experiments.runs import Row

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)


def get_config() -> Train:
    """Return the run that the figure is about: EOI on ERK densities."""
    return Train(
        experiment="appendix_k",
        model="resnet56",
        data="cifar10",
        init="fan_in",
        density=0.05,
        epochs=200,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return all densities and starts."""
    seeds = tuple((seed,) for seed in range(1, 6))
    dense = product(get_config(), seeds=seeds, method=("dense",), density=(1.0,))
    return dense + product(get_config(), seeds=seeds, density=DENSITIES, method=METHODS)


def quick() -> list[Train]:
    """Return a small perceptron at two densities, on made data."""
    own = Train(experiment="appendix_k", data="made", depth=3, width=20, method="base")
    return product(own, density=(0.1, 0.3))


def report(rows: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate and draw the accuracy."""
    caption = budget(rows, "the same")
    rows = named(rows)
    value = Value("test_accuracy", "test accuracy (%)", 100, best="highest")
    table = Table(
        "appendix_k",
        "The price of sparsity, ResNet-56 on CIFAR-10 (JPEG)",
        caption,
        rows,
        (value,),
        ("start",),
        "density",
        names=NAMES,
    )
    panel = Curves(
        rows, "density", value.key, "start", "density", value.name, scale=100, xscale="log"
    )
    return [table, Figure("appendix_k_accuracy", table.title, caption, (panel,), size=(6, 4))]
