"""Appendix A: the parameters of every network, and how many a density of 0.1 keeps.

Command: python -m experiments sweep appendix_a
Hardware: any. Time: seconds; only shapes are computed.
Expected: the published counts where a network is a published one.
"""

from __future__ import annotations

from experiments.config import Counts
from experiments.reporting.grids import NAMES, Items, Rows
from experiments.reporting.tables import Table, Value

CLASSES = {
    "mlp7": 10,
    "mlp1000": 10,
    "cnn1000": 10,
    "resnet32": 10,
    "resnet56": 10,
    "resnet110": 10,
    "vgg16": 10,
    "efficientnet_b0": 200,
    "resnet50": 1000,
    "deit_s": 1000,
}
NUMBERS = {"parameters": "parameters", "size": "pruned", "kept": "kept", "all_kept": "in all"}


def get_config() -> Counts:
    """Return one network."""
    return Counts(experiment="appendix_a")


def sweep() -> list[Counts]:
    """Return all networks with the classes of their data."""
    return [
        Counts(experiment="appendix_a", model=model, num_classes=number)
        for model, number in CLASSES.items()
    ]


def quick() -> list[Counts]:
    """Return the smallest network."""
    return [Counts(experiment="appendix_a", model="mlp7")]


def report(rows: Rows) -> Items:
    """Tabulate the counts."""
    table = Table(
        "appendix_a",
        "Parameters",
        "Pruned are the kernels of linear and convolutional layers, of DeiT III those of the MLP "
        "blocks alone; kept is what a density of 0.1 leaves of them by ERK; in all, with every "
        "other parameter.",
        rows,
        tuple(Value(key, name, fmt=",.0f", exact=True) for key, name in NUMBERS.items()),
        ("model", "num_classes"),
        names={**NAMES, "num_classes": "classes"},
    )
    return [table]
