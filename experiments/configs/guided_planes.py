"""Planes guided by a pattern: rotations inside a band, or in the planes of a butterfly.

A reader of the paper asked whether the planes can be guided towards a chosen pattern. Their list
decides the support; orthogonality holds for every list.

Command: python -m experiments sweep guided_planes --scale small
Hardware: two CPU cores for the small scale, one epoch of MLP-1000. Time: there 10 minutes.
Expected: open. In an epoch a butterfly trains nearly as well as independent planes, a band much
worse.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.configs import table1_mlp1000
from experiments.reporting.grids import budget, loss_panel, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row

PLANES = ("independent", "banded", "butterfly")


def get_config() -> Train:
    """Return the network with planes of a butterfly."""
    [own] = product(
        table1_mlp1000.get_config(), experiment=("guided_planes",), planes=("butterfly",)
    )
    return own


def sweep() -> list[Train]:
    """Return the three lists of planes."""
    return product(get_config(), seeds=tuple((seed,) for seed in range(1, 6)), planes=PLANES)


def small() -> list[Train]:
    """Return one epoch of the first seed."""
    return product(get_config(), epochs=(1,), learning_rate=(5e-4,), planes=PLANES)


def quick() -> list[Train]:
    """Return a small perceptron with planes inside a band, on made data."""
    own = Train(experiment="guided_planes", data="made", depth=3, width=20, density=0.3)
    return product(own, planes=("banded",))


def report(rows: Sequence[Row], curves: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy; draw the training loss."""
    caption = "MLP-1000, EOI on ERK densities. " + budget(rows, "nothing of the kind")
    table = Table(
        "guided_planes",
        "Planes inside a pattern",
        caption,
        rows,
        (
            Value("test_accuracy", "test accuracy (%)", 100, best="highest"),
            Value("spectrum_mean", "mean singular value at the start", form=".2g"),
            Value("spectrum_min", "smallest", form=".2g"),
            Value("spectrum_max", "largest", form=".2g"),
        ),
        ("planes",),
    )
    panel = loss_panel(curves, "planes", order=PLANES)
    title = "Training loss of MLP-1000 by planes"
    return [table, Figure("guided_planes_loss", title, caption, (panel,), size=(7, 4))]
