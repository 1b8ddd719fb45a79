"""Table 2, last column: EfficientNet-B0 on Tiny-ImageNet, all sparse starts.

Command: python -m experiments sweep table2_efficientnet --data-dir DIR
Hardware: one GPU; no smaller scale has been run. Time: not measured.
Expected: the one column of the paper in which EOI is not the best.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import CRITERIA, METHODS, NAMES, budget, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row


def get_config() -> Train:
    """Return the run that the column is about: EOI on ERK densities."""
    return Train(
        experiment="table2_efficientnet",
        model="efficientnet_b0",
        data="tiny_imagenet",
        init="fan_in",
        density=0.1,
        epochs=120,
        learning_rate=0.01,
        weight_decay=1e-3,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's column."""
    seeds = tuple((seed,) for seed in range(1, 6))
    dense = product(get_config(), seeds=seeds, method=("dense",), density=(1.0,))
    return dense + product(get_config(), seeds=seeds, criterion=CRITERIA, method=METHODS)


def quick() -> list[Train]:
    """Return none: the full network has no smaller version, its shapes are tested instead."""
    return []


def report(rows: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy."""
    table = Table(
        "table2_efficientnet",
        "EfficientNet-B0 on Tiny-ImageNet",
        budget(rows, "the same"),
        named(rows),
        (Value("test_accuracy", "test accuracy (%)", 100, best="highest"),),
        ("criterion",),
        "method",
        names=NAMES,
    )
    return [table]
