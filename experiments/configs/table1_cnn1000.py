"""Table 1, right: a plain 1000-layer tanh CNN on CIFAR-10 with an eighth of its weights.

Command: python -m experiments sweep table1_cnn1000 --scale small
Hardware: made for GPUs; the small scale, 8 channels and half an epoch, for two CPU cores.
Time: there ten minutes a start on one core.
Expected: dense delta-orthogonal and EOI learn, AI less, Base stays at chance. The paper: EOI about
78 %, AI below 40 %. At the small scale dense weights learn and EOI hardly begins to.
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
        experiment="table1_cnn1000",
        model="cnn1000",
        data="cifar10",
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
        *product(own, seeds=seeds, criterion=CRITERIA, method=(*METHODS, "eis")),
        *product(own, seeds=seeds, method=("sao",)),
    ]


def small() -> list[Train]:
    """Return the network of 8 channels, half an epoch, ERK only."""
    [own] = product(get_config(), width=(8,), epochs=(0.5,), learning_rate=(5e-4,))
    dense = product(own, method=("dense",), density=(1.0,))
    return dense + product(own, method=("eoi", "base", "ai"))


def quick() -> list[Train]:
    """Return a network of six layers on made data."""
    own = Train(
        experiment="table1_cnn1000",
        model="cnn1000",
        depth=6,
        width=8,
        data="made",
        density=0.25,
        scale=1.0247,
        bias_std=0.00448,
        batch_size=64,
    )
    return product(own, method=("eoi",))


def report(rows: Sequence[Row], curves: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy; draw the training loss."""
    widths = dict.fromkeys(128 if row["width"] is None else row["width"] for row in rows)
    caption = (
        f"1000 layers of {' or '.join(map(str, widths))} channels (the paper: 128), tanh, circular "
        "padding, density 0.125. " + budget(rows, "100 epochs, learning rate 0.0001, seeds 1 to 5")
    )
    rows, curves = named(rows), named(curves)
    table = Table(
        "table1_cnn1000",
        "CNN-1000 on CIFAR-10 (JPEG)",
        caption,
        rows,
        (
            Value("test_accuracy", "test accuracy (%)", 100, best="highest"),
            Value("test_loss", "test loss", form=".3f", best="lowest"),
        ),
        ("criterion", "method"),
        names=NAMES,
        order={"method": ("dense", "eoi", "ai", "base")},
    )
    panel = loss_panel(curves, order=("dense", "ERK EOI", "ERK AI", "ERK Base"))
    figure = Figure(
        "table1_cnn1000_loss", "Training loss of CNN-1000", caption, (panel,), size=(7, 4)
    )
    return [table, figure]
