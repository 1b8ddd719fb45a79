"""Table 2 and Figure 4: ResNets and VGG-16 on CIFAR-10, all sparse starts.

Command: python -m experiments sweep table2 --scale small
Hardware: made for GPUs; the small scale, two epochs of ResNet-32, for two CPU cores. Time: there
half an hour a start on one core.
Expected: EOI best in nearly every column, by half a percent to three, most at a density of 0.05.
Two epochs do not show final accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import CRITERIA, METHODS, NAMES, budget, loss_panel, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row

MODELS = ("resnet32", "resnet56", "resnet110", "vgg16")


def get_config() -> Train:
    """Return the run that the table is about: ResNet-32, EOI on ERK densities."""
    return Train(
        experiment="table2",
        model="resnet32",
        data="cifar10",
        init="fan_in",
        density=0.1,
        epochs=200,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    seeds = tuple((seed,) for seed in range(1, 6))
    dense = product(get_config(), model=MODELS, seeds=seeds, method=("dense",), density=(1.0,))
    return dense + product(
        get_config(),
        model=MODELS,
        seeds=seeds,
        criterion=CRITERIA,
        method=METHODS,
        density=(0.05, 0.1),
    )


def small() -> list[Train]:
    """Return two epochs of ResNet-32, ERK; a density of 0.05 last."""
    [own] = product(get_config(), epochs=(2,))
    dense = product(own, method=("dense",), density=(1.0,))
    return dense + product(own, density=(0.1, 0.05), method=("eoi", "base", "ai"))


def quick() -> list[Train]:
    """Return the smallest residual network on made data."""
    own = Train(
        experiment="table2",
        model="resnet32",
        depth=8,
        width=4,
        data="made",
        init="fan_in",
        density=0.3,
        batch_size=64,
    )
    return product(own, method=("base",))


def report(rows: Sequence[Row], curves: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy; draw the training loss."""
    caption = budget(rows, "200 epochs, all networks and criteria, seeds 1 to 5")
    rows, curves = named(rows), named(curves)
    table = Table(
        "table2",
        "Residual networks and VGG-16 on CIFAR-10 (JPEG)",
        caption,
        rows,
        (Value("test_accuracy", "test accuracy (%)", 100, best="highest"),),
        ("model", "density", "criterion", "method"),
        group=("model", "density"),
        names=NAMES,
    )
    panels = tuple(
        loss_panel(
            [row for row in curves if row["model"] == model and row["density"] in (density, 1.0)],
            title=f"{NAMES[model]}, density {density:g}",
            order=("dense", "ERK EOI", "ERK AI", "ERK Base"),
        )
        for model, density in dict.fromkeys((row["model"], row["density"]) for row in curves)
        if density < 1
    )
    return [
        table,
        Figure("table2_loss", "Training loss on CIFAR-10 (JPEG)", caption, panels, across=2),
    ]
