"""Table 2, last column: EfficientNet-B0 on Tiny-ImageNet, all sparse starts.

Command: python -m experiments sweep table2_efficientnet --data-dir DIR
Hardware: one GPU; no smaller scale has been run. Time: not measured.
Expected: the one column of the paper in which EOI is not the best.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table2
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows


def get_config() -> Train:
    """Return the run that the column is about: EOI on ERK densities."""
    return dataclasses.replace(
        table2.get_config(),
        experiment="table2_efficientnet",
        model="efficientnet_b0",
        data="tiny_imagenet",
        epochs=120,
        learning_rate=0.01,
        weight_decay=1e-3,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's column."""
    return grids.product_with_dense(
        get_config(), seeds=grids.SEEDS, criterion=grids.CRITERIA, method=grids.METHODS
    )


def quick() -> list[Train]:
    """Return none: the full network has no smaller version, its shapes are tested instead."""
    return []


def report(rows: Rows) -> Items:
    """Tabulate the accuracy."""
    title = "EfficientNet-B0 on Tiny-ImageNet"
    return [
        grids.table_of_runs(
            "table2_efficientnet", title, rows, "the same", ("criterion",), "method"
        )
    ]
