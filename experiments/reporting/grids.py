"""Shared by the config modules: grids of settings, display names, tables and figures of runs.

Use it in a module of :mod:`experiments.configs`, to list its configs and to report on them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from experiments.config import WITHOUT_CRITERION, Train
from experiments.reporting.figures import Curves, Figure
from experiments.reporting.tables import Table, Value, label
from experiments.runs import Row

__all__ = [
    "ACCURACY",
    "CRITERIA",
    "METHODS",
    "NAMES",
    "RATE",
    "SEEDS",
    "STARTS",
    "TRAIN_LOSS",
    "Items",
    "Rows",
    "loss_figure",
    "product",
    "product_of_starts",
    "product_with_dense",
    "rate_of",
    "settings_sentence",
    "starts_of",
    "table_of_runs",
    "tiny",
    "with_start_names",
]

Config = TypeVar("Config")
Rows: TypeAlias = Sequence[Row]
Items: TypeAlias = list[Table | Figure]

CRITERIA = ("uniform", "erdos_renyi_kernel", "snip", "grasp", "synflow")
METHODS = ("base", "ai", "eoi")
SEEDS = ((1,), (2,), (3,), (4,), (5,))  # the paper's; each is a run

# Starts by short names: the fields in which they differ.
STARTS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"method": "dense", "density": 1.0},
    "base": {"method": "base"},
    "rescaled": {"method": "rescaled"},
    "smupar": {"method": "rescaled", "density_power": 1.0},
    "ai": {"method": "ai"},
    "sao": {"method": "sao"},
    "blocks": {"method": "blocks", "block_size": 128},
    "two_of_four": {"method": "2:4", "density": 0.5},
    "eoi": {"method": "eoi"},
    "matching": {"method": "eoi", "planes": "matching"},
    "hadamard": {"method": "eoi", "planes": "matching", "angles": "hadamard"},
    "he": {"method": "eoi", "he_norm": True},
    "spread": {"method": "eoi", "taps": "spread"},
    "spread_matching": {"method": "eoi", "taps": "spread", "planes": "matching"},
    "spread_he": {"method": "eoi", "taps": "spread", "he_norm": True},
    "spread_matching_he": {
        **{"method": "eoi", "taps": "spread", "planes": "matching"},
        "he_norm": True,
    },
}

RATE = Value("measured_learning_rate", "learning rate", fmt="g", exact=True)
ACCURACY = Value("test_accuracy", "test accuracy (%)", 100, best="highest")
TRAIN_LOSS = Value("train_loss", "training loss (last tenth)", fmt=".3f", best="lowest")

# Display names, where they are not the names in configs with blanks for underscores.
NAMES: Mapping[Any, str] = {
    "base": "Base",
    "rescaled": "rescaled Base",
    "ai": "AI",
    "eoi": "EOI",
    "eis": "EIS",
    "sao": "SAO",
    "erdos_renyi": "ER",
    "erdos_renyi_kernel": "ERK",
    "snip": "SNIP",
    "grasp": "GraSP",
    "synflow": "SynFlow",
    "set": "SET",
    "rigl": "RigL",
    "identity": "linear",
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "selu": "SELU",
    "mlp7": "MLP-7",
    "mlp1000": "MLP-1000",
    "mlp7_wide": "MLP-7, wide",
    "mlp1000_wide": "MLP-1000, wide",
    "cnn1000": "CNN-1000",
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "resnet56": "ResNet-56",
    "resnet110": "ResNet-110",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "efficientnet_b0": "EfficientNet-B0",
    "deit_s": "DeiT III-S",
    "vit": "ViT",
    "vit_plain": "ViT without normalization",
    "gpt": "GPT",
    "gpt_plain": "GPT without normalization",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10 (JPEG)",
    "tiny_imagenet": "Tiny-ImageNet",
    "imagenet2012": "ImageNet",
    "made": "synthetic data",
    "topics": "Python's help texts",
}


def product(base: Config, **values: Sequence[Any]) -> list[Config]:
    """Replace fields of a config by all combinations of values."""
    return [
        dataclasses.replace(base, **dict(zip(values, chosen, strict=True)))  # type: ignore[type-var]
        for chosen in itertools.product(*values.values())
    ]


def product_with_dense(base: Config, **values: Sequence[Any]) -> list[Config]:
    """Return dense networks, then what :func:`product` makes of the same values."""
    sparse_only = ("criterion", "method", "density")
    shared = {field: values[field] for field in values if field not in sparse_only}
    dense = product(base, **shared, method=("dense",), density=(1.0,))
    return dense + product(base, **values)


def tiny(experiment: str, **fields: Any) -> Train:
    """Return the config of a perceptron of three layers on synthetic data, for a grid of tests."""
    return Train(experiment, **{"data": "made", "depth": 3, "width": 20, "density": 0.3, **fields})


def starts_of(base: Train, names: Sequence[str], **changes: Mapping[str, Any]) -> list[Train]:
    """Return configs of starts by their short names, in :data:`STARTS`.

    Args:
        base: What the starts share; a dense one has the density 1.
        names: Of the starts.
        changes: Further fields of single starts, by name.
    """
    return [
        dataclasses.replace(base, **{**STARTS[name], **changes.get(name, {})}) for name in names
    ]


def product_of_starts(base: Train, names: Sequence[str], **values: Sequence[Any]) -> list[Train]:
    """Return what :func:`starts_of` makes of each of the configs of :func:`product`."""
    return [run for each in product(base, **values) for run in starts_of(each, names)]


def with_start_names(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose start as a whole stands under ``"start"``: ``"ERK EOI"``, ``"dense"``.

    The criterion of starts that have none becomes None. Under ``"variant"`` stands the
    method with what distinguishes it: ``"EOI, spread, matching"``, ``"SμPar"``.

    Args:
        rows: With the fields ``method`` and ``criterion``.
    """
    found = []
    for row in rows:
        without = row["method"] in WITHOUT_CRITERION
        criterion = None if without else row["criterion"]
        variant = ", ".join([_method(row), *_differences(row)])
        start = f"{label(criterion, NAMES)} {variant}".strip()
        found.append({**row, "criterion": criterion, "start": start, "variant": variant})
    return found


def _method(row: Row) -> str:
    if row["method"] == "blocks":
        return f"blocks of {row['block_size']}"
    scaled = row["method"] == "rescaled" and row.get("density_power") == 1
    return "SμPar" if scaled else label(row["method"], NAMES)


def _differences(row: Row) -> list[str]:
    taps = row.get("taps") or "center"
    found = {"spread": ["spread"], "spread_both": ["spread both"]}.get(taps, [])
    if row.get("planes") == "matching":
        found.append("matching")
    if row.get("angles") == "hadamard":
        found.append("Hadamard angles")
    if row.get("he_norm"):
        found.append("He norm")
    return found


def settings_sentence(rows: Sequence[Row], paper: str) -> str:
    """State data, epochs, learning rates and seeds of rows, and what the paper has in their place.

    Args:
        rows: Of training runs, at least one; those without results count if no others are there.
        paper: Settings of the paper, such as ``"100 epochs, 5 seeds"``.
    """
    rows = [row for row in rows if row.get("seed") is not None] or rows

    def of(field: str, rows: Sequence[Row] = rows) -> str:
        return " or ".join(label(v, NAMES) for v in dict.fromkeys(row[field] for row in rows))

    by_row = [row["seeds"] if row.get("seed") is None else (row["seed"],) for row in rows]
    seeds = sorted({seed for some in by_row for seed in some})
    epochs, plural = of("epochs"), "s" if len(seeds) > 1 else ""
    several = [tuple(row.get("learning_rates") or ()) for row in rows]
    single = [row for row, some in zip(rows, several, strict=True) if not some]
    parts = []
    if any(several):
        each = dict.fromkeys(some for some in several if some)
        tried = " or ".join(", ".join(f"{rate:g}" for rate in some) for some in each)
        parts.append(
            f"the best learning rate of {tried} by the validation accuracy of the first seed"
        )
    if single:
        rates = of("learning_rate", single)
        parts.append(f"learning rate {rates}" + " in the other lines" * any(several))
    return (
        f"{of('data')}, {epochs} epoch{'' if epochs == '1' else 's'}, "
        f"batches of {of('batch_size')}, {', '.join(parts)}, "
        f"seed{plural} {', '.join(map(str, seeds))}. The paper: {paper}."
    )


def table_of_runs(
    name: str,
    title: str,
    rows: Sequence[Row],
    paper: str,
    lines: tuple[str, ...],
    columns: str | None = None,
    *,
    values: tuple[Value, ...] = (ACCURACY,),
    about: str = "",
    **looks: Any,
) -> Table:
    """Tabulate training runs, with a caption that states their settings and the paper's.

    Args:
        name: Of the table.
        title: Of a few words.
        rows: Of training runs; the field ``start`` is added.
        paper: Settings of the paper.
        lines: Fields of which each combination is a line.
        columns: Field of which each value is a column.
        values: What cells show; default: the test accuracy. :data:`RATE` is the rate chosen of
            several, or the only one.
        about: Sentences at the beginning of the caption.
        looks: Further fields of :class:`experiments.reporting.tables.Table`.
    """
    caption = f"{about} {settings_sentence(rows, paper)}".strip()
    looks = {"names": NAMES, **looks}
    return Table(name, title, caption, _with_rates(rows), values, lines, columns, **looks)


def _with_rates(rows: Sequence[Row]) -> list[Row]:
    """Return rows with the start's name, and those with results at one rate with that rate."""
    found = []
    for row in with_start_names(rows):
        is_known = row.get("seed") is not None
        found.append({**row, RATE.key: rate_of(row)} if is_known else row)
    return found


def rate_of(row: Row) -> float:
    """Return the learning rate of a result: the one chosen of several, or the only one."""
    rate: float = row.get(RATE.key) or row["learning_rate"]
    return rate


def loss_figure(
    name: str,
    title: str,
    caption: str,
    curves: Sequence[Row],
    *panels: str,
    by: str = "start",
    **looks: Any,
) -> Figure:
    """Draw the training loss against the step, with the deviations as bands.

    Args:
        name: Of the table beside which the figure stands.
        title: Of a few words.
        caption: That of the table.
        curves: What was logged, with the fields of the configs; only lines of training are drawn.
        panels: Fields of which each combination of a sparse network is a panel. With the density
            among them dense networks are in each panel. Default: one panel.
        by: Field of which each value is a curve.
        looks: Further fields of :class:`experiments.reporting.figures.Curves`.
    """
    train = [row for row in with_start_names(curves) if row["split"] == "train"]
    found = dict.fromkeys(tuple(row[field] for field in panels) for row in train)
    drawn = []
    for cell in found:
        of = dict(zip(panels, cell, strict=True))
        if of.get("density") == 1.0:
            continue
        rows = [
            row
            for row in train
            if all(row[f] == v or (f == "density" and row[f] == 1.0) for f, v in of.items())
        ]
        words = [
            f"{f} {v:g}" if f in ("density", "depth") and v is not None else label(v, NAMES)
            for f, v in of.items()
        ]
        axes = ("step", "loss", by, "training step", "cross-entropy (nats)")
        drawn.append(Curves(rows, *axes, ", ".join(words), spread="band", markers=False, **looks))
    size = {"across": 2} if len(drawn) > 1 else {"size": (7, 4)}
    return Figure(f"{name}_loss", title, caption, tuple(drawn), **size)  # type: ignore[arg-type]
