"""Appendix J, Figure 12: ResNet-50 and DeiT III-S on ImageNet, ERK from Base and from EOI.

DeiT III is sparse only in its MLP blocks or, beyond the paper, also in its heads of attention.

Command: python -m experiments sweep appendix_j --data-dir DIR
Hardware: a server of GPUs; it has not been run. Time: not measured. Optimizer and
augmentation are those of the other tables: the recipes for ImageNet are not published.
Expected: similar curves for ResNet-50, EOI clearly better for DeiT III.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import table2
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows


def get_config() -> Train:
    """Return one run of the figure: ResNet-50 from EOI."""
    return dataclasses.replace(
        table2.get_config(),
        experiment="appendix_j",
        model="resnet50",
        data="imagenet2012",
        epochs=100,
    )


def sweep() -> list[Train]:
    """Return ResNet-50, DeiT III-S with sparse MLP blocks, and with sparse attention too."""
    methods = ("base", "eoi")
    return [
        *grids.product(get_config(), method=methods),
        *grids.product(get_config(), model=("deit_s",), attention=(False, True), method=methods),
    ]


def quick() -> list[Train]:
    """Return none: the full networks are checked by their shapes."""
    return []


def report(rows: Rows) -> Items:
    """Tabulate the accuracy."""
    table = grids.table_of_runs(
        "appendix_j",
        "ImageNet",
        rows,
        "one curve each, its budget not published",
        ("model", "attention"),
        "start",
        names={**grids.NAMES, "attention": "sparse attention", True: "yes", False: "no"},
        group=("model",),
    )
    return [table]
