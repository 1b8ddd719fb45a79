"""What the config modules share: products of settings, names, captions that state the budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from experiments.reporting.figures import Curves
from experiments.runs import Row

__all__ = ["CRITERIA", "METHODS", "NAMES", "budget", "loss_panel", "named", "product"]

Config = TypeVar("Config")

CRITERIA = ("uniform", "erdos_renyi_kernel", "snip", "grasp", "synflow")
METHODS = ("base", "ai", "eoi")
NAMES: Mapping[Any, str] = {
    "dense": "dense",
    "base": "Base",
    "ai": "AI",
    "eoi": "EOI",
    "eis": "EIS",
    "sao": "SAO",
    "uniform": "uniform",
    "erdos_renyi": "ER",
    "erdos_renyi_kernel": "ERK",
    "magnitude": "magnitude",
    "random": "random",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "static": "static",
    "set": "SET",
    "rigl": "RigL",
    "identity": "linear",
    "tanh": "tanh",
    "hard_tanh": "hard tanh",
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "selu": "SELU",
    "mlp7": "MLP-7",
    "mlp1000": "MLP-1000",
    "cnn1000": "CNN-1000",
    "resnet32": "ResNet-32",
    "resnet56": "ResNet-56",
    "resnet110": "ResNet-110",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "efficientnet_b0": "EfficientNet-B0",
    "deit_s": "DeiT III-S",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10 (JPEG)",
    "tiny_imagenet": "Tiny-ImageNet",
    "imagenet2012": "ImageNet",
    "made": "made data",
}


def product(base: Config, **values: Sequence[Any]) -> list[Config]:
    """Replace fields of a config by all combinations of values.

    Args:
        base: a dataclass.
        values: for each field, its values; the first field varies slowest.

    Returns:
        One config for each combination.

    Example:
        >>> from experiments.reporting import grids
        >>> from experiments.config import Train
        >>> own = grids.product(Train(), method=("base", "eoi"), density=(0.05, 0.1))
        >>> [(config.method, config.density) for config in own]
        [('base', 0.05), ('base', 0.1), ('eoi', 0.05), ('eoi', 0.1)]
    """
    return [
        dataclasses.replace(base, **dict(zip(values, own, strict=True)))  # type: ignore[type-var]
        for own in itertools.product(*values.values())
    ]


def named(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose start as a whole stands under ``"start"``: ``"ERK EOI"``, ``"dense"``.

    Dense and SAO starts have no criterion; theirs becomes None.

    Example:
        >>> from experiments.reporting import grids
        >>> rows = [{"method": method, "criterion": "snip"} for method in ("eoi", "dense")]
        >>> [row["start"] for row in grids.named(rows)]
        ['SNIP EOI', 'dense']
    """
    found = []
    for row in rows:
        criterion = None if row["method"] in ("dense", "sao") else row["criterion"]
        words = [NAMES[own] for own in (criterion, row["method"]) if own is not None]
        found.append({**row, "criterion": criterion, "start": " ".join(words)})
    return found


def budget(rows: Sequence[Row], paper: str) -> str:
    """State data, epochs, learning rates and seeds of rows, and what the paper has in their place.

    Args:
        rows: of training runs, at least one; those without results count if no others are there.
        paper: budget of the paper, such as ``"100 epochs, 5 seeds"``.

    Returns:
        Two sentences for a caption.

    Example:
        >>> from experiments import config
        >>> from experiments.reporting import grids
        >>> rows = [config.to_dict(config.Train(epochs=2, seeds=(1, 2, 3)))]
        >>> grids.budget(rows, "100 epochs").split(", batches ")
        ['MNIST, 2 epochs', 'of 128, learning rate 0.01, seeds 1, 2, 3. The paper: 100 epochs.']
        >>> grids.budget([*rows, {**rows[0], "seed": 2}], "none").split(", ")[-1]
        'seed 2. The paper: none.'
    """
    rows = [row for row in rows if row.get("seed") is not None] or rows

    def of(field: str) -> str:
        values = dict.fromkeys(row[field] for row in rows)
        return " or ".join(
            NAMES.get(v, f"{v:g}" if isinstance(v, float) else str(v)) for v in values
        )

    own = [row["seeds"] if row.get("seed") is None else (row["seed"],) for row in rows]
    seeds = sorted({seed for some in own for seed in some})
    epochs, many = of("epochs"), "s" if len(seeds) > 1 else ""
    return (
        f"{of('data')}, {epochs} epoch{'' if epochs == '1' else 's'}, "
        f"batches of {of('batch_size')}, learning rate {of('learning_rate')}, "
        f"seed{many} {', '.join(map(str, seeds))}. The paper: {paper}."
    )


def loss_panel(curves: Sequence[Row], by: str = "start", title: str = "", **looks: Any) -> Curves:
    """Draw the training loss against the step, a curve for each value of a field.

    Args:
        curves: what was logged; only lines of training are drawn.
        by: the field.
        title: of the panel.
        looks: further fields of :class:`experiments.reporting.figures.Curves`.

    Returns:
        A panel with the deviations as bands.

    Example:
        >>> from experiments.reporting import grids
        >>> lines = [{"split": split, "step": 1, "loss": 2.0} for split in ("train", "test")]
        >>> len(grids.loss_panel(lines).rows)
        1
    """
    return Curves(
        [row for row in curves if row["split"] == "train"],
        "step",
        "loss",
        by,
        "training step",
        "cross-entropy (nats)",
        title,
        spread="band",
        markers=False,
        **looks,
    )
