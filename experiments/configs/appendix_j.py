"""Appendix J, Figure 12: ResNet-50 and DeiT III-S on ImageNet, ERK from Base and from EOI.

DeiT III is sparse in its MLP blocks alone and, beyond the paper, in its heads of attention too.

Command: python -m experiments sweep appendix_j --data-dir DIR
Hardware: a server of GPUs; nothing of it has been run. Time: not measured. Optimizer and
augmentation are those of the other tables: the recipes for ImageNet are not published.
Expected: similar curves for ResNet-50, EOI clearly better for DeiT III.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import NAMES, budget, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row


def get_config() -> Train:
    """Return one run of the figure: ResNet-50 from EOI."""
    return Train(
        experiment="appendix_j",
        model="resnet50",
        data="imagenet2012",
        init="fan_in",
        density=0.1,
        epochs=100,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return ResNet-50, DeiT III-S with sparse MLP blocks, and with sparse attention too."""
    methods = ("base", "eoi")
    return [
        *product(get_config(), method=methods),
        *product(get_config(), model=("deit_s",), attention=(False, True), method=methods),
    ]


def quick() -> list[Train]:
    """Return none: the full networks are checked by their shapes."""
    return []


def report(rows: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy."""
    table = Table(
        "appendix_j",
        "ImageNet",
        budget(rows, "one curve each, its budget not published"),
        named(rows),
        (Value("test_accuracy", "test accuracy (%)", 100, best="highest"),),
        ("model", "attention"),
        "start",
        names={**NAMES, "attention": "sparse attention", True: "yes", False: "no"},
        group=("model",),
    )
    return [table]
