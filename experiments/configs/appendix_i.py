"""Appendix I: EOI against dynamic sparse training, and as its start.

The paper compares EOI with SET and RigL; whether they gain from EOI as their start is an open
question of its authors.

Command: python -m experiments sweep appendix_i
Hardware: one GPU; no smaller scale has been run. Time: not measured.
Expected: SET and RigL slightly better than EOI alone, within a standard deviation. From EOI: open.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import NAMES, budget, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row


def get_config() -> Train:
    """Return the run that answers the open question: RigL from EOI."""
    return Train(
        experiment="appendix_i",
        model="resnet32",
        data="cifar10",
        init="fan_in",
        dynamic="rigl",
        density=0.1,
        epochs=200,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return static masks, SET and RigL, each from Base and from EOI."""
    return product(
        get_config(),
        seeds=tuple((seed,) for seed in range(1, 6)),
        density=(0.05, 0.1),
        dynamic=("static", "set", "rigl"),
        method=("base", "eoi"),
    )


def quick() -> list[Train]:
    """Return small perceptrons with SET and RigL, on made data."""
    own = Train(experiment="appendix_i", data="made", depth=3, width=20, method="base")
    return product(own, dynamic=("set", "rigl"))


def report(rows: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy."""
    table = Table(
        "appendix_i",
        "Masks that stay and masks that change, on CIFAR-10 (JPEG)",
        budget(rows, "the same, without SET and RigL from EOI"),
        named(rows),
        (Value("test_accuracy", "test accuracy (%)", 100, best="highest"),),
        ("model", "density", "start"),
        "dynamic",
        group=("density",),
        names=NAMES,
    )
    return [table]
