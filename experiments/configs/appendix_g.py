"""Appendix G, Figure 9: do the angles of the rotations matter?

The paper trains ResNet-32 from EOI with all angles 1 degree, all 80 degrees, and uniform ones.
The small scale adds the 1000-layer MLP, where a start shows within a few hundred steps.

Command: python -m experiments sweep appendix_g --scale small
Hardware: made for GPUs; the small scale for two CPU cores. Time: there half an hour on one core.
Expected: 1 degree starts worse, for its matrices are near to the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.configs import table1_mlp1000
from experiments.reporting.grids import NAMES, budget, loss_panel, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row

ANGLES = ("uniform", "1", "80")


def get_config() -> Train:
    """Return the run that the figure is about: ResNet-32 from EOI."""
    return Train(
        experiment="appendix_g",
        model="resnet32",
        data="cifar10",
        init="fan_in",
        density=0.1,
        epochs=200,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's figure."""
    seeds = tuple((seed,) for seed in range(1, 6))
    return product(get_config(), seeds=seeds, angles=ANGLES)


def small() -> list[Train]:
    """Return an epoch of MLP-1000, and half an epoch of ResNet-32."""
    [deep] = product(
        table1_mlp1000.get_config(),
        experiment=("appendix_g",),
        epochs=(1,),
        learning_rate=(5e-4,),
    )
    return product(deep, angles=ANGLES) + product(get_config(), epochs=(0.5,), angles=ANGLES)


def quick() -> list[Train]:
    """Return a small perceptron with one constant angle, on made data."""
    own = Train(experiment="appendix_g", data="made", depth=3, width=20, density=0.3)
    return product(own, angles=("80",))


def report(rows: Sequence[Row], curves: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy; draw the training loss."""
    caption = budget(rows, "200 epochs of ResNet-32, seeds 1 to 5") + " EOI on ERK densities."
    names = {**NAMES, "1": "1°", "80": "80°"}
    table = Table(
        "appendix_g",
        "Angles of the rotations",
        caption,
        rows,
        (
            Value("test_accuracy", "test accuracy (%)", 100, best="highest"),
            Value("validation_loss", "validation loss", form=".3f", best="lowest"),
        ),
        ("model", "density", "angles"),
        group=("model",),
        names=names,
    )
    panels = tuple(
        loss_panel(
            [row for row in curves if row["model"] == model],
            "angles",
            NAMES[model],
            names=names,
            order=ANGLES,
        )
        for model in dict.fromkeys(row["model"] for row in curves)
    )
    return [table, Figure("appendix_g_loss", "Training loss by angle", caption, panels, across=2)]
