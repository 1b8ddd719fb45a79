"""Appendix I: EOI against dynamic sparse training, and as its start.

The paper compares EOI with SET and RigL; whether they gain from EOI as their start is an open
question of its authors.

Command: python -m experiments sweep appendix_i --scale small
Hardware: one GPU; the small scale, one epoch of ResNet-20, for two CPU cores. Time: there three to
ten minutes a run on one core.
Expected: SET and RigL slightly better than EOI alone, within a standard deviation. From EOI: open.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table2
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows


def get_config() -> Train:
    """Return the run that answers the open question: RigL from EOI."""
    return dataclasses.replace(table2.get_config(), experiment="appendix_i", dynamic="rigl")


def sweep() -> list[Train]:
    """Return static masks, SET and RigL, each from Base and from EOI."""
    return grids.product(
        get_config(),
        seeds=grids.SEEDS,
        density=(0.05, 0.1),
        dynamic=("static", "set", "rigl"),
        method=("base", "eoi"),
    )


def small() -> list[Train]:
    """Return one epoch of ResNet-20 at density 0.1, and EOI with spread taps and He's norms."""
    base = dataclasses.replace(get_config(), model="resnet20", epochs=1)
    names, masks = ("base", "eoi", "spread_he"), ("rigl", "set", "static")
    return grids.product_of_starts(base, names, dynamic=masks)


def quick() -> list[Train]:
    """Return small perceptrons with SET and RigL, on synthetic data."""
    start = grids.tiny("appendix_i", density=0.1, method="base")
    return grids.product(start, dynamic=("set", "rigl"))


def report(rows: Rows) -> Items:
    """Tabulate the accuracy."""
    table = grids.table_of_runs(
        "appendix_i",
        "Masks that stay and masks that change, on CIFAR-10 (JPEG)",
        rows,
        "the same, without SET and RigL from EOI",
        ("model", "density", "start"),
        "dynamic",
        group=("density",),
    )
    return [table]
