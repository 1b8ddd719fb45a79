"""Table 1, left: a plain 1000-layer tanh MLP on MNIST with an eighth of its weights.

Command: python -m experiments sweep table1_mlp1000 --scale small
Hardware: two CPU cores. Time: 2.5 to 4 minutes an epoch on one core; AI 4 to 6 more a seed. The
small scale, two epochs for ERK and one for other criteria, two hours; the paper's, weeks.
Expected: dense orthogonal, EOI and AI learn, EOI within reach of dense; Base stays at chance.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import CRITERIA, METHODS, NAMES, budget, loss_panel, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row


def get_config() -> Train:
    """Return the run that the table is about: EOI on ERK densities."""
    return Train(
        experiment="table1_mlp1000",
        model="mlp1000",
        density=0.125,
        scale=1.0247,
        bias_std=0.00448,
        ai_steps=1000,
        epochs=100,
        learning_rate=1e-4,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    own, seeds = get_config(), tuple((seed,) for seed in range(1, 6))
    return [
        *product(own, seeds=seeds, method=("dense",), density=(1.0,)),
        *product(own, seeds=seeds, criterion=CRITERIA, method=METHODS),
        *product(own, seeds=seeds, method=("sao",)),
    ]


def small() -> list[Train]:
    """Return what two CPU cores reach: two epochs for ERK, then one for the other criteria."""
    two, one = product(get_config(), epochs=(2, 1), learning_rate=(5e-4,))
    others = tuple(criterion for criterion in CRITERIA if criterion != "erdos_renyi_kernel")
    grid = []
    for seeds in ((1,), (2,), (3,)):
        grid += product(two, seeds=(seeds,), method=("dense",), density=(1.0,))
        grid += product(two, seeds=(seeds,), method=("eoi", "base", "ai", "sao"))
    return grid + product(one, criterion=others, method=("base", "eoi"))


def quick() -> list[Train]:
    """Return five-layer networks on made data, from the starts that the other tables leave out."""
    own = Train(
        experiment="table1_mlp1000",
        model="mlp1000",
        depth=5,
        width=16,
        data="made",
        density=0.25,
        scale=1.0247,
        bias_std=0.00448,
        ai_steps=5,
        batch_size=64,
    )
    return product(own, method=("dense",), density=(1.0,)) + product(own, method=("sao",))


def report(rows: Sequence[Row], curves: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy; draw the training loss."""
    caption = "1000 layers of width 128, tanh, density 0.125. " + budget(
        rows, "100 epochs, learning rate 0.0001, seeds 1 to 5"
    )
    rows, curves = named(rows), named(curves)
    table = Table(
        "table1_mlp1000",
        "MLP-1000 on MNIST",
        caption,
        rows,
        (
            Value("test_accuracy", "test accuracy (%)", 100, best="highest"),
            Value("test_loss", "test loss", form=".3f", best="lowest"),
            Value("spectrum_mean", "mean singular value at the start", form=".2g"),
        ),
        ("epochs", "criterion", "method"),
        group=("epochs",),
        names=NAMES,
        order={"epochs": (100, 2, 1), "method": ("dense", "eoi", "ai", "base", "sao")},
    )
    long = max(row["epochs"] for row in rows)
    panel = loss_panel(
        [row for row in curves if row["epochs"] == long],
        order=("dense", "ERK EOI", "ERK AI", "ERK Base", "SAO"),
    )
    figure = Figure(
        "table1_mlp1000_loss", "Training loss of MLP-1000", caption, (panel,), size=(7, 4)
    )
    return [table, figure]
