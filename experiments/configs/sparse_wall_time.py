"""Where sparsity saves time: accuracy against wall time, for dense, masked, 2:4 and block layers.

A perceptron of 7 layers of width 2048 trains on MNIST in batches of 256. The five layers between
the first and the last have an eighth of their weights: under a mask (unstructured EOI), where a
step takes as long as a dense one, or in stored blocks of 128 x 128, also exactly orthogonal. The
pattern 2:4 keeps half of the weights and is a mask here, since no CPU has products for it. Times
are those of training steps, without compilation and evaluation, so nothing else may run on the
machine.

Command: python -m experiments sweep sparse_wall_time --scale small --data-dir DIR
Hardware: two CPU cores that have no other work. Time: one and a half minutes for blocks, five for
each other run.
Expected: blocks are about as accurate as the mask of the same density, in a fraction of the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.config import Train
from experiments.reporting import grids
from experiments.reporting.figures import Curves, Figure
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value
from experiments.runs import Row

TIMED = True
"""The curves of this module have times."""

TARGET = 0.96  # of the validation images: the highest whole percent that all reach in three epochs
NAMES = ("blocks", "dense", "eoi", "two_of_four")
VARIANTS: Mapping[str, str] = {
    "EOI": "EOI, unstructured mask",
    "2:4": "EOI, 2:4 mask (density 0.5)",
    "blocks of 128": "EOI, blocks of 128",
    "blocks of 32": "EOI, blocks of 32",
}
ORDER = {"variant": ("dense", *VARIANTS)}
SECONDS = f"seconds_to_{TARGET:.0%}"


def get_config() -> Train:
    """Return the run that the table is about: layers of blocks."""
    return Train(
        "sparse_wall_time",
        model="mlp7_wide",
        method="blocks",
        criterion="uniform",
        density=0.125,
        block_size=128,
        batch_size=256,
        epochs=20,
        learning_rates=(0.03, 0.06, 0.12),
        validate_every=30,
    )


def sweep() -> list[Train]:
    """Return 20 epochs of five seeds, and a vision transformer with sparse perceptrons.

    Each start has the best of three rates; the more weights it has, the lower they are.
    """
    plain = dataclasses.replace(get_config(), method="eoi", block_size=0)
    vit = dataclasses.replace(plain, model="vit", data="cifar10", batch_size=128)
    rates = {
        "dense": {"learning_rates": (0.006, 0.0125, 0.025)},
        "two_of_four": {"learning_rates": (0.0125, 0.025, 0.05)},
    }
    return [
        *(
            run
            for each in grids.product(plain, seeds=grids.SEEDS)
            for run in grids.starts_of(each, NAMES, **rates)
        ),
        *grids.starts_of(vit, NAMES, **rates, blocks={"block_size": 32}),
    ]


def small() -> list[Train]:
    """Return three epochs of the perceptron, one seed, at one rate a density.

    Rates are a quarter of the best on validation images at width 512, where dense weights diverge
    at twice theirs, since a step changes a wider layer more.
    """
    plain = dataclasses.replace(
        get_config(), method="eoi", block_size=0, epochs=3, learning_rates=(), learning_rate=0.06
    )
    rates = {"dense": {"learning_rate": 0.025}, "two_of_four": {"learning_rate": 0.04}}
    return grids.starts_of(plain, NAMES, **rates)


def quick() -> list[Train]:
    """Return narrow networks on synthetic data."""
    plain = grids.tiny(
        "sparse_wall_time", model="mlp7_wide", width=32, density=0.25, validate_every=2
    )
    return grids.starts_of(plain, NAMES, blocks={"block_size": 8})


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate accuracy and times; draw the accuracy against the time."""
    rows = [{**row, **_times(row, curves)} for row in rows]
    names = {**grids.NAMES, **VARIANTS}
    table = grids.table_of_runs(
        "sparse_wall_time",
        "What sparsity saves: accuracy and wall time",
        rows,
        "no such comparison",
        ("model", "variant"),
        about="Only layers between the first and the last, or perceptrons of the transformer, are "
        "sparse, with density 0.125 (2:4: 0.5). Times are those of training steps alone, without "
        "compilation and evaluation; validation accuracy is measured every 30 steps.",
        values=(
            Value("rate", "learning rate", fmt="g"),
            grids.ACCURACY,
            Value("seconds_an_epoch", "seconds an epoch", fmt=".1f", best="lowest"),
            Value(SECONDS, f"seconds to {TARGET:.0%}", fmt=".1f", best="lowest"),
        ),
        group=("model",),
        names=names,
        order=ORDER,
    )
    panels = tuple(
        Curves(
            _mean_times([line for line in curves if line["model"] == model]),
            *("seconds", "accuracy", "variant"),
            xlabel="seconds of training",
            ylabel="validation accuracy (%)",
            title=grids.NAMES.get(model, model),
            scale=100,
            spread="band",
            markers=False,
            names=names,
            order=ORDER["variant"],
        )
        for model in dict.fromkeys(line["model"] for line in curves)
    )
    name, title = "sparse_wall_time_accuracy", "Validation accuracy against wall time"
    figure = Figure(name, title, table.caption, panels, across=2, size=(7.0, 4.0))
    return [table, figure]


def _times(row: Row, curves: Rows) -> Row:
    """Return the times of one run, and its learning rate.

    Times are None where they are not known, or the accuracy is not reached.
    """
    lines = [
        line
        for line in curves
        if line["digest"] == row["digest"]
        and line["seed"] == row.get("seed")
        and line.get("seconds") is not None
    ]
    reached = (
        line["seconds"]
        for line in lines
        if line["split"] == "validation" and line["accuracy"] >= TARGET
    )
    an_epoch = lines[-1]["seconds"] / lines[-1]["epoch"] if lines else None
    return {
        "seconds_an_epoch": an_epoch,
        SECONDS: min(reached, default=None),
        "rate": grids.rate_of(row) if row.get("seed") is not None else None,
    }


def _mean_times(curves: Rows) -> Sequence[Row]:
    """Return the lines of validation, at the mean time that the seeds took to their step."""
    lines = [
        line
        for line in grids.with_start_names(curves)
        if line["split"] == "validation" and line.get("seconds") is not None
    ]
    times: dict[tuple[str, int], list[float]] = {}
    for line in lines:
        times.setdefault((line["variant"], line["step"]), []).append(line["seconds"])
    means = {key: sum(found) / len(found) for key, found in times.items()}
    return [{**line, "seconds": means[line["variant"], line["step"]]} for line in lines]
