"""Loss curves of MLP-7 on MNIST, from every start (beside Figure 3).

Command: python -m experiments sweep loss_curves
Hardware: two CPU cores. Time: about two days at the paper's 100 epochs; --scale small, three epochs
of ERK with tanh, three minutes on one core.
Expected: at a density of 0.05 EOI's loss falls first and furthest of the sparse starts. In three
epochs AI's falls alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import CRITERIA, METHODS, NAMES, budget, loss_panel, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row

DENSITIES = (0.05, 0.1)
ACTIVATIONS = ("identity", "tanh", "hard_tanh", "relu")


def get_config() -> Train:
    """Return the run that the figure is about: EOI on ERK densities."""
    return Train(
        experiment="loss_curves",
        activation="tanh",
        density=0.05,
        epochs=100,
        learning_rate=0.01,
        seeds=(1, 2, 3, 4, 5),
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's figure."""
    return [
        *product(get_config(), activation=ACTIVATIONS, method=("dense",), density=(1.0,)),
        *product(
            get_config(),
            activation=ACTIVATIONS,
            criterion=CRITERIA,
            method=METHODS,
            density=DENSITIES,
        ),
    ]


def small() -> list[Train]:
    """Return three epochs of ERK with tanh."""
    return [
        config
        for config in product(get_config(), epochs=(3,), method=("dense",), density=(1.0,))
        + product(get_config(), epochs=(3,), method=METHODS, density=DENSITIES)
    ]


def quick() -> list[Train]:
    """Return a tiny run of two seeds on made data."""
    own = Train(
        experiment="loss_curves",
        activation="tanh",
        data="made",
        depth=3,
        width=20,
        batch_size=64,
        seeds=(1, 2),
    )
    return product(own, method=("base",))


def report(rows: Sequence[Row], curves: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy; draw the training loss."""
    caption = budget(rows, "100 epochs, all criteria, seeds 1 to 5")
    rows, curves = named(rows), named(curves)
    table = Table(
        "loss_curves",
        "MLP-7 on MNIST",
        caption,
        rows,
        (Value("test_accuracy", "test accuracy (%)", 100, best="highest"),),
        ("activation", "start"),
        "density",
        group=("activation",),
        names=NAMES,
    )
    of = dict.fromkeys((row["activation"], row["density"]) for row in rows)
    panels = tuple(
        loss_panel(
            [
                row
                for row in curves
                if row["activation"] == activation and row["density"] in (density, 1.0)
            ],
            title=f"{NAMES[activation]}, density {density:g}",
            yscale="log",
        )
        for activation, density in of
        if density < 1
    )
    return [table, Figure("loss_curves_loss", "Training loss of MLP-7", caption, panels, across=2)]
