"""Dense networks of equal size: do as many weights do better in a dense network?

Readers of the paper asked for this comparison: a dense network with as many weights as the sparse
one keeps, to one percent, of smaller width at the same depth, or of smaller depth at the same
width.

Command: python -m experiments sweep equal_parameters --scale small
Hardware: two CPU cores for the small scale, two epochs of MLP-1000 and five of MLP-7. Time: there
eight minutes on one core.
Expected: open. Dense orthogonal networks of a thousand layers train too; shallow ones more easily.
At the small scale they match EOI with MLP-1000 and are ahead of it with MLP-7.
"""

from __future__ import annotations

import dataclasses

from experiments.config import Train
from experiments.configs import loss_curves, table1_mlp1000
from experiments.reporting import grids
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Value
from experiments.studies.parameter_matching import dense_of_equal_size


def get_config() -> Train:
    """Return the sparse network of the comparison."""
    return dataclasses.replace(table1_mlp1000.get_config(), experiment="equal_parameters")


def sweep() -> list[Train]:
    """Return sparse and dense networks of two sizes."""
    shallow = dataclasses.replace(
        loss_curves.get_config(), experiment="equal_parameters", density=0.1
    )
    grid = []
    for seeds in grids.SEEDS:
        for network in (get_config(), shallow):
            sparse = dataclasses.replace(network, seeds=seeds)
            grid += [sparse, dense_of_equal_size(sparse, "width", range(2, 128))]
            if sparse.model == "mlp1000":
                grid.append(dense_of_equal_size(sparse, "depth", range(100, 150)))
    return grid


def small() -> list[Train]:
    """Return the first seed with two epochs of MLP-1000, and five of MLP-7."""
    return [
        dataclasses.replace(config, epochs=2, learning_rate=5e-4)
        if config.model == "mlp1000"
        else dataclasses.replace(config, epochs=5)
        for config in sweep()
        if config.seeds == (1,)
    ]


def quick() -> list[Train]:
    """Return a small dense network as large as a sparse one, on synthetic data."""
    return [
        dense_of_equal_size(grids.tiny("equal_parameters", density=0.494), "width", range(2, 20))
    ]


def report(rows: Rows) -> Items:
    """Tabulate the accuracy."""
    table = grids.table_of_runs(
        "equal_parameters",
        "Dense networks of equal size",
        rows,
        "nothing of the kind; 100 epochs elsewhere",
        ("model", "start", "depth", "width"),
        values=(Value("kept", "weights", fmt=",.0f"), grids.ACCURACY),
        group=("model",),
    )
    return [table]
