"""Sparse transformers: EOI in perceptrons, in attention or in both, with and without normalization.

The paper prunes only the perceptrons of DeiT III and leaves attention open. Here a small language
model learns Python's help texts character by character, and a small vision transformer learns
CIFAR-10. Each is 6 or 48 blocks deep, with layer normalization, or without it and with branches
scaled by the depth. In attention every head has a matrix of its own. Each start has the best of
three learning rates of AdamW.

Command: python -m experiments sweep transformers --scale small --data-dir DIR
Hardware: two CPU cores. Time: a run of 6 blocks three minutes on one core, of 48 blocks six; three
runs a start.
Expected: with 6 blocks, EOI level with rescaled Base, and Base, whose weights are smaller, ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.config import Train
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value
from experiments.runs import Row

PERCEPTRONS, ATTENTION, BOTH = "perceptrons", "attention", "both"
PARTS: Mapping[str, Mapping[str, bool]] = {
    PERCEPTRONS: {},
    ATTENTION: {"attention": True, "perceptrons": False},
    BOTH: {"attention": True},
}
# Those in which the comparison is closest first: a sweep may be stopped.
STARTS: Mapping[str, tuple[str, ...]] = {
    BOTH: ("eoi", "rescaled", "smupar", "base", "he"),
    PERCEPTRONS: ("eoi", "rescaled", "smupar"),
    ATTENTION: ("eoi", "rescaled", "smupar"),
}
ORDER = {
    "model": ("gpt_plain", "gpt", "vit_plain", "vit"),
    "depth": (6, 48),
    "part": ("none", PERCEPTRONS, ATTENTION, BOTH),
    "variant": ("dense", "Base", "rescaled Base", "SμPar", "EOI", "EOI, He norm"),
}


def get_config() -> Train:
    """Return the run that the table is about: EOI in all kernels of the blocks."""
    return Train(
        "transformers",
        model="gpt_plain",
        data="topics",
        attention=True,
        criterion="uniform",
        density=0.125,
        depth=6,
        width=64,
        batch_size=32,
        epochs=40,
        optimizer="adamw",
        learning_rates=(16e-3, 32e-3, 64e-3),
    )


def sweep() -> list[Train]:
    """Return all starts of both networks, 6 and 48 blocks deep, with five seeds."""
    base = dataclasses.replace(get_config(), seeds=(1, 2, 3, 4, 5))
    vision = _of_images(base)
    text = grids.product(base, depth=(6, 48), model=("gpt_plain", "gpt"))
    images = grids.product(vision, depth=(6, 48), model=("vit_plain", "vit"))
    return [run for each in (*text, *images) for run in _starts(each)]


def small() -> list[Train]:
    """Return four epochs of one seed; at 48 blocks one, and on images half of one."""
    base = dataclasses.replace(get_config(), epochs=4)
    text = grids.product(base, depth=(6,), model=("gpt_plain", "gpt"))
    deep = grids.product(base, epochs=(1,), depth=(48,), model=("gpt_plain", "gpt"))
    vision = _of_images(dataclasses.replace(base, epochs=0.5))
    images = grids.product(vision, model=("vit_plain", "vit"))
    return [run for each in (*text, *deep, *images) for run in _starts(each)]


def _of_images(base: Train) -> Train:
    rates = (4e-3, 8e-3, 16e-3)
    return dataclasses.replace(base, data="cifar10", batch_size=128, learning_rates=rates)


def quick() -> list[Train]:
    """Return a narrow network of two blocks."""
    base = dataclasses.replace(
        get_config(), depth=2, width=16, density=0.25, epochs=0.05, learning_rates=()
    )
    names = ("eoi", "rescaled")
    return grids.starts_of(dataclasses.replace(base, **_parts(ATTENTION)), names)


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate loss and accuracy by the kernels that are sparse; draw the training loss."""
    rows, curves = ([{**row, "part": _part(row)} for row in each] for each in (rows, curves))
    table = grids.table_of_runs(
        "transformers",
        "Sparse transformers, each start at its best learning rate",
        rows,
        "DeiT III with sparse perceptrons on ImageNet alone",
        ("model", "depth", "part", "variant"),
        about="Networks of width 64 with 4 heads, density 0.125 in each sparse kernel, AdamW. "
        "Singular values are those of the blocks' Jacobian at the start.",
        values=(
            grids.RATE,
            Value("test_loss", "test loss", fmt=".3f", best="lowest"),
            grids.ACCURACY,
            Value("spectrum_mean", "mean singular value", fmt=".2g"),
            Value("spectrum_max", "largest", fmt=".2g"),
        ),
        group=("model", "depth"),
        names={**grids.NAMES, "part": "sparse"},
        order=ORDER,
    )
    # Where all kernels of the blocks are sparse; a curve for each part would be too many.
    whole = [row for row in curves if row["part"] in ("none", BOTH)]
    figure = grids.loss_figure(
        "transformers",
        "Training loss of transformers, all kernels of the blocks sparse",
        table.caption,
        whole,
        *("model", "depth"),
        by="variant",
        order=ORDER["variant"],
    )
    return [table, figure]


def _parts(part: str) -> dict[str, Any]:
    return {"attention": False, "perceptrons": True, **PARTS[part]}


def _starts(base: Train) -> list[Train]:
    """Return the dense start, and the sparse ones in each part of the network."""
    # Deep language models with normalization take lower rates. Networks with one sparse part are
    # between those with two and dense ones. SμPar multiplies its rates by 8 where the mask is.
    is_deep = base.model == "gpt" and base.depth == 48
    if is_deep:
        base = dataclasses.replace(base, learning_rates=_times(0.25, base.learning_rates))
    of_dense = (2e-3, 4e-3, 8e-3)
    if base.model == "gpt_plain":
        of_dense = (4e-3, 8e-3, 16e-3)
    elif base.model == "vit" or is_deep:
        of_dense = (0.5e-3, 1e-3, 2e-3)
    rates: Mapping[str, Any] = {
        "dense": {"learning_rates": of_dense},
        "smupar": {"learning_rates": _times(0.25, base.learning_rates)},
    }
    sparse = []
    for part, names in STARTS.items():
        of_part = dataclasses.replace(base, **_parts(part))
        if part != BOTH:
            lower = 0.25 if (base.model, part) == ("gpt", PERCEPTRONS) else 0.5
            of_part = dataclasses.replace(
                of_part, learning_rates=_times(lower, base.learning_rates)
            )
        sparse += grids.starts_of(of_part, names, **rates)
    dense = grids.starts_of(dataclasses.replace(base, **_parts(BOTH)), ("dense",), **rates)
    return dense + sparse


def _times(factor: float, rates: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(factor * rate for rate in rates)


def _part(row: Row) -> str:
    """Return which kernels of the blocks are sparse."""
    if row["method"] == "dense":
        return "none"
    if not row["attention"]:
        return PERCEPTRONS
    return ATTENTION if row.get("perceptrons") is False else BOTH
