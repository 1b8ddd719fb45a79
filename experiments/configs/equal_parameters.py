"""Dense networks of equal size: what else could the kept weights have been spent on?

The readers of the paper asked for it: a dense network with as many weights as the sparse one keeps,
to one percent, of smaller width at the same depth, or of smaller depth at the same width.

Command: python -m experiments sweep equal_parameters --scale small
Hardware: two CPU cores for the small scale, two epochs of MLP-1000 and five of MLP-7. Time: there
eight minutes on one core.
Expected: open. Dense orthogonal networks of a thousand layers train too; shallow ones more easily.
At the small scale they match EOI with MLP-1000 and are ahead of it with MLP-7.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.config import Train
from experiments.configs import loss_curves, table1_mlp1000
from experiments.reporting.grids import NAMES, budget, named, product
from experiments.reporting.report import Figure, Table, Value
from experiments.runs import Row
from experiments.studies.parameter_matching import dense_of_equal_size


def get_config() -> Train:
    """Return the sparse network of the comparison."""
    [own] = product(table1_mlp1000.get_config(), experiment=("equal_parameters",))
    return own


def sweep() -> list[Train]:
    """Return sparse and dense networks of two sizes."""
    [wide] = product(
        loss_curves.get_config(), experiment=("equal_parameters",), density=(0.1,), seeds=((1,),)
    )
    grid = []
    for seed in range(1, 6):
        for sparse in product(get_config(), seeds=((seed,),)) + product(wide, seeds=((seed,),)):
            grid += [sparse, dense_of_equal_size(sparse, "width", range(2, 128))]
            if sparse.model == "mlp1000":
                grid.append(dense_of_equal_size(sparse, "depth", range(100, 150)))
    return grid


def small() -> list[Train]:
    """Return the first seed with two epochs of MLP-1000, and five of MLP-7."""
    grid = []
    for own in sweep():
        if own.seeds == (1,) and own.model == "mlp1000":
            grid += product(own, epochs=(2,), learning_rate=(5e-4,))
        elif own.seeds == (1,):
            grid += product(own, epochs=(5,))
    return grid


def quick() -> list[Train]:
    """Return a small dense network as large as a sparse one, on made data."""
    own = Train(experiment="equal_parameters", data="made", depth=3, width=20, density=0.494)
    return [dense_of_equal_size(own, "width", range(2, 20))]


def report(rows: Sequence[Row]) -> list[Table | Figure]:
    """Tabulate the accuracy."""
    table = Table(
        "equal_parameters",
        "Dense networks of equal size",
        budget(rows, "nothing of the kind; 100 epochs elsewhere"),
        named(rows),
        (
            Value("kept", "weights", form=",.0f"),
            Value("test_accuracy", "test accuracy (%)", 100, best="highest"),
        ),
        ("model", "start", "depth", "width"),
        group=("model",),
        names=NAMES,
    )
    return [table]
