"""Planes guided by a pattern: rotations inside a band, or in the planes of a butterfly.

A reader of the paper asked whether the planes can be guided towards a chosen pattern. The list of
planes decides the support; the matrix is orthogonal with every list.

Command: python -m experiments sweep guided_planes --scale small
Hardware: two CPU cores for the small scale, one epoch of MLP-1000. Time: 10 minutes at this scale.
Expected: open. In one epoch, planes of a butterfly train nearly as well as independent planes, and
planes in a band much worse.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table1_mlp1000
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value

PLANES = ("independent", "banded", "butterfly")


def get_config() -> Train:
    """Return the network with planes of a butterfly."""
    return dataclasses.replace(
        table1_mlp1000.get_config(), experiment="guided_planes", planes="butterfly"
    )


def sweep() -> list[Train]:
    """Return the three lists of planes."""
    return grids.product(get_config(), seeds=grids.SEEDS, planes=PLANES)


def small() -> list[Train]:
    """Return one epoch of the first seed."""
    return grids.product(get_config(), epochs=(1,), learning_rate=(5e-4,), planes=PLANES)


def quick() -> list[Train]:
    """Return a small perceptron with planes inside a band, on synthetic data."""
    return [grids.tiny("guided_planes", planes="banded")]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    table = grids.table_of_runs(
        "guided_planes",
        "Planes inside a pattern",
        rows,
        "nothing of the kind",
        ("planes",),
        about="MLP-1000, EOI on ERK densities.",
        values=(
            grids.ACCURACY,
            Value("spectrum_mean", "mean singular value at the start", fmt=".2g"),
            Value("spectrum_min", "smallest", fmt=".2g"),
            Value("spectrum_max", "largest", fmt=".2g"),
        ),
    )
    title = "Training loss of MLP-1000 by planes"
    return [
        table,
        grids.loss_figure("guided_planes", title, table.caption, curves, by="planes", order=PLANES),
    ]
