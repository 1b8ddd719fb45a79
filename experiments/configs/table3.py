"""Table 3: ResNet-32 and VGG-16 with tanh, leaky ReLU and SELU on CIFAR-10, density 0.1.

Command: python -m experiments sweep table3
Hardware: one GPU; no smaller scale has been run. Time: not measured.
Expected: EOI best for most activations and criteria.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.reporting.grids import CRITERIA, METHODS, NAMES, budget, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row

MODELS = ("resnet32", "vgg16")
ACTIVATIONS = ("tanh", "leaky_relu", "selu")


def get_config() -> Train:
    """Return one run of the table: ResNet-32 with tanh, EOI on ERK densities."""
    return Train(
        experiment="table3",
        model="resnet32",
        activation="tanh",
        data="cifar10",
        init="fan_in",
        density=0.1,
        epochs=200,
        learning_rate=0.1,
    )


def sweep() -> list[Train]:
    """Return all runs of the paper's table."""
    of = {
        "model": MODELS,
        "activation": ACTIVATIONS,
        "seeds": tuple((seed,) for seed in range(1, 6)),
    }
    return [
        *product(get_config(), **of, method=("dense",), density=(1.0,)),
        *product(get_config(), **of, criterion=CRITERIA, method=METHODS),
    ]


def quick() -> list[Train]:
    """Return a small perceptron with SELU, on made data."""
    own = Train(
        experiment="table3",
        activation="selu",
        depth=3,
        width=20,
        data="made",
        density=0.3,
        batch_size=64,
    )
    return product(own, method=("base",))


def report(rows: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy."""
    table = Table(
        "table3",
        "Other activations on CIFAR-10 (JPEG), density 0.1",
        budget(rows, "the same"),
        named(rows),
        (Value("test_accuracy", "test accuracy (%)", 100, best="highest"),),
        ("model", "criterion", "method"),
        "activation",
        group=("model",),
        names=NAMES,
    )
    return [table]
