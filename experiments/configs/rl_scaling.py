"""Does static sparsity help PPO as its networks grow, and does the start matter?

Actor and critic are perceptrons of three hidden layers. Their two square kernels keep all weights,
or a fifth, a tenth or a twentieth of them: under a random mask, rescaled to the mask's fan-in, by
EOI, or in blocks of a 16th of the width. Each cell is trained at the best of three learning rates,
chosen with seeds that are not reported.

Command: python -m experiments sweep rl_scaling --scale small
Hardware: one CPU core. Time: some four hours, more than half of it for width 1024, which
comes last.
Expected: open. Graesser et al. find that sparse networks learn as well as dense ones down to a
tenth of the weights; Ma et al. that static sparsity lets larger networks learn.

References:
    Graesser et al., "The State of Sparse Training in Deep Reinforcement Learning", ICML 2022.

    Ma et al., "Network Sparsity Unlocks the Scaling Potential of Deep Reinforcement Learning",
    ICML 2025, arXiv:2506.17204.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes

from experiments.config import Ppo
from experiments.reporting import grids
from experiments.reporting.figures import COLORS, DASHES, MARKERS, Curves, Figure
from experiments.reporting.grids import Items, Rows
from experiments.reporting.tables import Table, Value
from experiments.rl.aggregates import bootstrap_interval, interquartile_mean
from experiments.runs import Row

DENSITIES = (0.05, 0.1, 0.2)
STARTS = ("rescaled", "matching")
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_MEASURES: tuple[tuple[str, str, Literal["linear", "log"]], ...] = (
    ("dormant_actor", "dormant units of the actor", "linear"),
    ("smallest", "smallest singular value", "log"),
    ("largest", "largest singular value", "log"),
)
ENVS = (
    *("CartPole-v1", "Acrobot-v1"),
    *("Breakout-MinAtar", "Asterix-MinAtar", "SpaceInvaders-MinAtar"),
)
WIDTHS = (64, 128, 256, 512, 1024)
ORDER: Mapping[str, Sequence[Any]] = {
    "env": ENVS,
    "width": WIDTHS,
    "density": (1.0, *sorted(DENSITIES, reverse=True)),
    "variant": ("dense", "Base", "rescaled Base", "EOI", "EOI, matching", "blocks"),
}


def get_config() -> Ppo:
    """Return the run that the table is about: EOI with planes by matchings."""
    return Ppo(
        "rl_scaling",
        depth=3,
        method="eoi",
        planes="matching",
        num_envs=8,
        total_steps=1_000_000,
        learning_rates=(2.5e-4, 5e-4, 1e-3),
        seeds=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    )


def sweep() -> list[Ppo]:
    """Return five environments and both kinds of networks, with SET and RigL: for a GPU."""
    runs = []
    for each in grids.product(
        get_config(),
        env=ENVS,
        network=("mlp", "simba"),
        width=WIDTHS,
    ):
        moving = dataclasses.replace(each, planes="independent")
        starts = ("base", "rescaled", "eoi", "matching")
        runs += _cells(each, DENSITIES, starts)
        runs += grids.product(moving, density=DENSITIES, dynamic=("set", "rigl"))
    return runs


def small() -> list[Ppo]:
    """Return 100 000 steps of five seeds, one environment after the other, and one wide network.

    Rates fall with the width, and those of dense networks first.
    """
    base = dataclasses.replace(
        get_config(), total_steps=100_000, rate_seeds=(101, 102), seeds=(1, 2, 3, 4, 5)
    )
    sizes: list[Any] = [
        *itertools.product(("CartPole-v1", "Breakout-MinAtar", "Acrobot-v1"), (64, 256)),
        ("CartPole-v1", 1024),
    ]
    runs = []
    for env, width in sizes:
        densities = DENSITIES if width < 1024 else (0.1,)
        for cell in _cells(dataclasses.replace(base, env=env, width=width), densities, STARTS):
            lowest = {64: 2, 256: 2, 1024: 1}[width] - (cell.method == "dense" and width > 64)
            rates = _RATES[lowest : lowest + 3]
            runs.append(dataclasses.replace(cell, learning_rates=rates))
    return runs


def quick() -> list[Ppo]:
    """Return tiny networks that see a few episodes."""
    base = dataclasses.replace(
        get_config(),
        width=8,
        density=0.375,
        num_envs=2,
        num_steps=8,
        num_epochs=2,
        num_minibatches=2,
        total_steps=1200,
        num_points=3,
        learning_rates=(),
        learning_rate=1e-2,
        seeds=(1, 2),
    )
    return [base, dataclasses.replace(base, method="rescaled", planes="independent")]


def _cells(base: Ppo, densities: Sequence[float], starts: Sequence[str]) -> list[Ppo]:
    """Return the dense networks of one size, then each start at each density.

    Of blocks there are 16 in a row, too few for the lowest density.
    """
    plain: Any = dataclasses.replace(base, planes="independent")
    runs = [dataclasses.replace(plain, method="dense", density=1.0)]
    size = max(1, base.width // 16)
    for density in densities:
        each = dataclasses.replace(plain, density=density)
        runs += [dataclasses.replace(each, **grids.STARTS[name]) for name in starts]
        if density >= 1 / 16:
            runs.append(dataclasses.replace(each, method="blocks", block_size=size))
    return runs


def report(rows: Rows, curves: Rows) -> Items:
    """Tabulate final returns; draw curves, returns against weights, and what became of units."""
    rows, curves = _named(rows), _named(curves)
    done = [row for row in rows if row.get("return") is not None]
    caption = _caption(rows)
    best = Value("interquartile_mean", "return", fmt=".1f", best="highest")
    columns = tuple(
        Value(name, words, fmt=fmt)
        for name, words, fmt in (
            ("dormant_actor", "dormant, actor", ".0%"),
            ("dormant_critic", "dormant, critic", ".0%"),
            ("smallest_at_start", "smallest at the start", ".2g"),
            ("smallest", "smallest", ".2g"),
            ("largest", "largest", ".2g"),
        )
    )
    looks: Any = {"names": grids.NAMES, "order": ORDER, "group": ("env", "width")}
    lines = ("env", "width", "density", "variant")
    table = ReturnTable(
        "rl_scaling",
        "PPO from sparse starts: returns",
        f"{caption} Interquartile means of the seeds' returns in the last tenth of the training, "
        "with 95 % stratified bootstrap intervals.",
        _by_cell(rows),
        (best, Value("rate", "learning rate", fmt="g", exact=True)),
        lines,
        **looks,
    )
    health = Table(
        "rl_scaling_units",
        "PPO from sparse starts: dormant units and the actor's Jacobian",
        f"{caption} At the end of the training, unless it says at the start: fraction of hidden "
        "units that are dormant, and the range of the singular values of the Jacobian of the "
        "actor's sparse layers at two observations.",
        rows,
        columns,
        lines,
        **looks,
    )
    return [table, health, *_figures(done, curves, caption)]


@dataclasses.dataclass(frozen=True)
class ReturnTable(Table):
    """A table of interquartile means, whose rows have the interval as ``interval``."""

    def body(self) -> Any:
        """Yield the lines of :class:`Table`, with intervals in place of deviations."""
        intervals: Any = {self._line(row): row.get("interval") for row in self.rows}
        for line, cells in super().body():
            texts = list(cells)
            text, cell, bold = texts[0]
            if cell is not None:
                low, high = intervals[line]
                text = f"{cell.mean:.1f} [{low:.1f}, {high:.1f}]"
            yield line, [(text, cell, bold), *texts[1:]]

    def note(self) -> str:
        """Say what the cells show."""
        return "Bold: the highest of each environment and width. Empty: not run."


def _named(rows: Rows) -> list[Row]:
    """Return rows with the start's name as ``variant``, and the rate they were trained at.

    Of residual networks the environment's name is followed by theirs: they are apart everywhere.
    """
    found = []
    for row in grids.with_start_names(rows):
        variant = "blocks" if row["method"] == "blocks" else row["variant"]
        if row["dynamic"] != "static":
            variant = f"{grids.NAMES[row['dynamic']]} from {variant}"
        rate = grids.rate_of(row) if row.get("return") is not None else None
        env = f"{row['env']}, SimBa" if row["network"] == "simba" else row["env"]
        found.append({**row, "env": env, "variant": variant, "rate": rate})
    return found


def _by_cell(rows: Rows) -> list[Row]:
    """Return one row for all seeds of a config, with interquartile mean and interval."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["digest"], []).append(row)
    found = []
    for group in groups.values():
        returns = [row["return"] for row in group if row.get("return") is not None]
        measured: Row = {}
        if returns and not any(map(math.isnan, returns)):
            measured = {
                "interquartile_mean": interquartile_mean(returns),
                "interval": bootstrap_interval([returns]),
            }
        found.append({**group[0], "seed": None, **measured})
    return found


def _caption(rows: Rows) -> str:
    row = rows[0]
    seeds = sorted({seed for each in rows for seed in each["seeds"]})
    steps = f"{row['total_steps']:,}".replace(",", " ")
    return (
        f"PPO of {steps} environment steps, {row['num_envs']} environments, depth {row['depth']}; "
        "only the kernels between first and last layer are sparse; the best of three learning "
        f"rates, chosen by other seeds; seeds {', '.join(map(str, seeds))}."
    )


def _figures(rows: Rows, curves: Rows, caption: str) -> list[Figure]:
    cells = [row for row in _by_cell(rows) if row.get("interval")]
    sizes = dict.fromkeys((row["env"], row["width"]) for row in rows)
    envs = dict.fromkeys(env for env, _ in sizes)
    looks: Any = {"markers": False, "names": grids.NAMES, "order": ORDER["variant"]}
    steps = "environment steps"
    learning = tuple(
        Curves(
            [line for line in _shown(curves, env, width) if not math.isnan(line["return"])],
            *("step", "return", "variant", steps, "mean return"),
            title=f"{env}, width {width}",
            spread="band",
            **looks,
        )
        for env, width in sizes
    )
    against = tuple(
        functools.partial(_returns_against_weights, env, [c for c in cells if c["env"] == env])
        for env in envs
    )
    measures = tuple(
        Curves(
            [line for line in _shown(curves, env, width) if not math.isnan(line[field])],
            *("step", field, "variant", steps, words),
            title=f"{env}, width {width}",
            yscale=yscale,
            spread="none",
            **looks,
        )
        for env, width in ((env, max(width for e, width in sizes if e == env)) for env in envs)
        for field, words, yscale in _MEASURES
    )
    return [
        Figure("rl_scaling_curves", "Learning curves of PPO", caption, learning),
        Figure("rl_scaling_weights", "Return against weights", caption, against),
        Figure("rl_scaling_measures", "Dormant units, and Jacobian", caption, measures),
    ]


def _shown(curves: Rows, env: str, width: int) -> list[Row]:
    """Return the lines of dense networks of one size, and of the sparse ones of one density."""
    lines = [line for line in curves if (line["env"], line["width"]) == (env, width)]
    sparse = {line["density"] for line in lines} - {1.0}
    density = min(sparse, key=lambda density: abs(density - 0.1), default=1.0)
    return [line for line in lines if line["density"] in (density, 1.0)]


def _returns_against_weights(env: str, cells: Rows, axes: Axes) -> None:
    """Draw interquartile means with their intervals against the number of weights."""
    order = [name for name in ORDER["variant"] if name in {cell["variant"] for cell in cells}]
    for name in order:
        points = sorted((c for c in cells if c["variant"] == name), key=lambda c: c["kept"])
        x = np.array([point["kept"] for point in points])
        y = np.array([point["interquartile_mean"] for point in points])
        ends = np.array([point["interval"] for point in points]).T
        index = ORDER["variant"].index(name)
        axes.errorbar(
            x,
            y,
            np.abs(ends - y),
            capsize=3,
            color=COLORS[index],
            linestyle=DASHES[index],
            marker=MARKERS[index],
            label=name,
        )
    axes.set(xscale="log", xlabel="weights", ylabel="return", title=env)
    axes.grid(alpha=0.3)
