"""Time to initialize: whole networks with each method, and one matrix with EOI, SAO, AI and QR."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich.console import Console

import eoi_jax as eoi
from eoi_jax._internal.files import atomic_savefig
from eoi_jax.typing import Array
from experiments import config, data, models
from experiments.benchmarks.timing import haar, machine, medians, sparse, tabulate
from experiments.training import starts
from experiments.training.criteria import DenseNetwork
from experiments.training.keys import Purpose

__all__ = ["Methods", "bench_methods", "network_starts", "plot", "seconds_of"]

_SIZES = (2**7, 2**8, 2**9, 2**10, 2**11, 2**12)
_DENSITIES = (2**-7, 2**-6, 2**-5, 2**-4, 2**-3, 2**-2, 2**-1)
# The paper's density and steps of AI for each network.
_NETWORKS = {"mlp7": (0.1, 10_000), "resnet32": (0.1, 10_000), "mlp1000": (0.125, 1_000)}
_LONG = 60.0  # seconds: a longer call is run only once


@dataclasses.dataclass(frozen=True)
class Methods:
    """Initialize networks with every method, and matrices with EOI, SAO, AI and QR."""

    quick: bool = False
    """Only MLP-7 and sizes up to 512, and 100 steps of AI."""
    networks: bool = True
    """Time the networks."""
    matrices: bool = True
    """Time the matrices."""
    repeats: int = 5
    """Runs of each matrix; the median is reported."""
    output: str = "benchmark_methods.png"
    """Where the plot is saved."""


def bench_methods(options: Methods, console: Console) -> None:
    """Print the tables of ``methods`` and save its plot."""
    console.print(machine())
    if options.networks:
        _bench_networks(options, console)
    if options.matrices:
        _bench_matrices(options, console)


def network_starts(model: str, density: float, ai_steps: int) -> dict[str, Callable[[], Any]]:
    """Return every method as a function without arguments, from dense weights on."""
    dataset = data.load("made", image_shape=models.input_shape(model))
    base = config.Start(
        model=model, data="made", method="base", init="fan_in", density=density, ai_steps=ai_steps
    )
    net = DenseNetwork(base, 0, dataset, starts.dense(base, 0, dataset))

    def start(method: config.Method, **fields: Any) -> Callable[[], eoi.SparseInit]:
        changed = dataclasses.replace(base, method=method, **fields)
        return functools.partial(starts.METHODS[method], net._replace(config=changed))

    return {
        "dense orthogonal (QR)": lambda: starts.redraw_orthogonal(
            net.key(Purpose.WEIGHTS), net.params, 1.0, net.where
        ),
        "ERK, random mask (Base)": start("base"),
        "magnitude (Base)": start("base", criterion="magnitude"),
        "SNIP (Base)": start("base", criterion="snip"),
        "GraSP (Base)": start("base", criterion="grasp", batch_size=32),
        "SynFlow, 100 rounds (Base)": start("base", criterion="synflow"),
        "ERK, EOI": start("eoi"),
        "SAO": start("sao"),
        "ERK, AI": start("ai"),
    }


def _bench_networks(options: Methods, console: Console) -> None:
    """Print the seconds that each method takes to initialize each network."""
    networks = {"mlp7": (0.1, 100)} if options.quick else _NETWORKS
    cells: dict[str, list[str]] = {}
    for name, (density, ai_steps) in networks.items():
        for method, start in network_starts(name, density, ai_steps).items():
            try:
                cell = _first_and_warm(start)
            except ValueError as error:
                cell = "– / –"
                console.print(f"{name}, {method}: {error}", highlight=False)
            cells.setdefault(method, []).append(cell)
            jax.clear_caches()
    heads = ["method", *(f"{name}, density {density}" for name, (density, _) in networks.items())]
    title = "Seconds to initialize a network: first call (with compilation) / again"
    rows = ([method, *seconds] for method, seconds in cells.items())
    console.print(tabulate(title, heads, rows, names=1))
    taken = ", ".join(f"{ai_steps:,} ({name})" for name, (_, ai_steps) in networks.items())
    console.print(
        f"Steps of AI: {taken}. A call of more than {_LONG:.0f} s is not repeated (…). "
        "An empty cell: the method cannot do it."
    )


def _first_and_warm(start: Callable[[], Any]) -> str:
    """Time a method twice: once with compilation, once without."""
    seconds: list[float] = []
    for _ in range(2):
        begin = time.perf_counter()
        jax.block_until_ready(start())
        seconds.append(time.perf_counter() - begin)
        if seconds[0] > _LONG:
            return f"{seconds[0]:.0f} / …"
    return f"{seconds[0]:.2g} / {seconds[1]:.2g}"


def _bench_matrices(options: Methods, console: Console) -> None:
    """Print the milliseconds of one matrix with each method over sizes and densities."""
    rows = {
        (size, density): seconds
        for size in (_SIZES[:3] if options.quick else _SIZES)
        for density, seconds in seconds_of(size, _DENSITIES, options.repeats).items()
    }
    heads = ("n", "d", "EOI", "QR", "SAO", "one step of AI", "QR / EOI", "EOI in steps of AI")
    cells = []
    for (size, density), row in rows.items():
        milliseconds = [1e3 * row[method] for method in ("EOI", "QR", "SAO", "AI")]
        cells.append(
            [
                str(size),
                f"1/{round(1 / density)}",
                *("–" if math.isnan(time) else f"{time:.3g}" for time in milliseconds),
                f"{row['QR'] / row['EOI']:.1f}",
                f"{row['EOI'] / row['AI']:.2g}",
            ]
        )
    console.print(tabulate("Milliseconds to draw one n x n matrix of density d", heads, cells))
    slower = [f"n = {n}, d = {d:.3g}" for (n, d), row in rows.items() if row["EOI"] > row["QR"]]
    steps = max(row["EOI"] / row["AI"] for row in rows.values())
    console.print(
        f"Cells where EOI is slower than QR: {', '.join(slower) or 'none'}. No draw of EOI takes "
        f"longer than {steps:.1f} steps of AI; the paper takes 10,000. QR and a step of AI "
        "do not depend on the density. SAO has no degree below 2."
    )
    path = Path(options.output)
    atomic_savefig(path, plot(rows), dpi=120)
    console.print(f"Plot: {path}")


def seconds_of(
    size: int, densities: Sequence[float], repeats: int
) -> dict[float, dict[str, float]]:
    """Time one ``size x size`` matrix with each method, all of them in turns.

    Args:
        size: Rows and columns.
        densities: Fractions of non-zeros; those below one non-zero a row are left out.
        repeats: Runs of each, of which the median counts; at most 3 from size 4096 on and of AI.

    Returns:
        For each density the seconds of EOI, SAO (NaN where the degree is below 2 or divides the
        size into no blocks), one descent step of AI, and QR; the last two do not depend on density.
    """
    repeats = repeats if size < 4096 else min(repeats, 3)
    key, calls = jax.random.key(0), dict[str, Callable[[], Any]]()
    feasible = [density for density in densities if density * size >= 1]
    calls["QR"] = functools.partial(haar((size, size)), key)
    for density in feasible:
        calls[f"EOI {density}"] = functools.partial(sparse((size, size), density), key)
        degree = round(density * size)
        if degree >= 2 and size % degree == 0:
            draw = jax.jit(functools.partial(eoi.sao.orthogonal, size=size, degree=degree))
            calls[f"SAO {density}"] = functools.partial(draw, key)
    seconds = medians(calls, repeats)
    step = _seconds_of_a_step(size, repeats)
    return {
        density: {
            "EOI": seconds[f"EOI {density}"],
            "SAO": seconds.get(f"SAO {density}", math.nan),
            "AI": step,
            "QR": seconds["QR"],
        }
        for density in feasible
    }


def _seconds_of_a_step(size: int, repeats: int) -> float:
    """Time one descent step of AI: the difference of a long run and a short one, by its length."""
    kernel = jax.random.normal(jax.random.key(1), (size, size)) / size**0.5
    mask = jax.random.bernoulli(jax.random.key(2), 0.125, (size, size))
    few, many = (1, 101) if size <= 512 else (1, 11) if size <= 1024 else (1, 3)

    def run(steps: int) -> Callable[[], Array]:
        solve = jax.jit(functools.partial(eoi.isometry.approximate_isometry, num_steps=steps))
        return functools.partial(solve, kernel, mask)

    seconds = medians({"few": run(few), "many": run(many)}, min(repeats, 3))
    return (seconds["many"] - seconds["few"]) / (many - few)


def plot(rows: Mapping[tuple[int, float], Mapping[str, float]]) -> Figure:
    """Plot time against size at density 1/8, and against density at one size up to 1024.

    Args:
        rows: By size and density, as :func:`seconds_of` returns them.
    """
    looks = {
        "EOI": ("EOI", "#0072B2", "-", "o"),
        "QR": ("dense orthogonal (QR)", "#D55E00", "--", "s"),
        "SAO": ("SAO", "#009E73", "-.", "^"),
        "AI": ("AI, 10,000 times one measured step", "#000000", ":", "x"),
    }
    sizes = sorted({size for size, _ in rows})
    density, size = 0.125, max(n for n in sizes if n <= 1024)
    densities = sorted(d for n, d in rows if n == size)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, ticks, labels, cells in (
        (left, sizes, map(str, sizes), [(n, density) for n in sizes]),
        (
            right,
            densities,
            [f"1/{round(1 / d)}" for d in densities],
            [(size, d) for d in densities],
        ),
    ):
        for method, (label, color, style, marker) in looks.items():
            factor = 10_000 if method == "AI" else 1
            seconds = [rows[cell][method] * factor for cell in cells]
            axes.plot(ticks, seconds, style, color=color, marker=marker, label=label)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, labels)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    title = f"Against size, density {density}"
    left.set(xlabel="n of an n x n matrix", ylabel="time (s)", title=title)
    right.set(xlabel="density (fraction of non-zeros)", title=f"Against density, n = {size}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(machine(), fontsize=9)
    return figure
