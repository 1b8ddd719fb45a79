"""Appendix G, Figure 9: do the angles of the rotations matter?

The paper trains ResNet-32 from EOI with all angles 1 degree, all 80 degrees, and uniform ones.
The small scale adds the 1000-layer MLP, where starts differ within a few hundred steps.

Command: python -m experiments sweep appendix_g --scale small
Hardware: made for GPUs; the small scale for two CPU cores. Time: there half an hour on one core.
Expected: 1 degree starts worse, since its matrices are close to the identity.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table1_mlp1000, table2
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value

ANGLES = ("uniform", "1", "80")


def get_config() -> Train:
    """Return the run that the figure is about: ResNet-32 from EOI."""
    return dataclasses.replace(table2.get_config(), experiment="appendix_g")


def sweep() -> list[Train]:
    """Return all runs of the paper's figure."""
    return grids.product(get_config(), seeds=grids.SEEDS, angles=ANGLES)


def small() -> list[Train]:
    """Return an epoch of MLP-1000, and half an epoch of ResNet-32."""
    deep = dataclasses.replace(
        table1_mlp1000.get_config(), experiment="appendix_g", epochs=1, learning_rate=5e-4
    )
    residual = dataclasses.replace(get_config(), epochs=0.5)
    return grids.product(deep, angles=ANGLES) + grids.product(residual, angles=ANGLES)


def quick() -> list[Train]:
    """Return a small perceptron with one constant angle, on synthetic data."""
    return [grids.tiny("appendix_g", angles="80")]


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate the accuracy; draw the training loss."""
    names = {**grids.NAMES, "1": "1°", "80": "80°"}
    table = grids.table_of_runs(
        "appendix_g",
        "Angles of the rotations",
        rows,
        "200 epochs of ResNet-32, seeds 1 to 5. EOI on ERK densities",
        ("model", "density", "angles"),
        values=(
            grids.ACCURACY,
            Value("validation_loss", "validation loss", fmt=".3f", best="lowest"),
        ),
        group=("model",),
        names=names,
    )
    figure = grids.loss_figure(
        "appendix_g",
        "Training loss by angle",
        table.caption,
        curves,
        "model",
        by="angles",
        names=names,
        order=ANGLES,
    )
    return [table, figure]
