"""Time, compile time and memory of drawing matrices, against JAX's own initializers."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from matplotlib.figure import Figure
from rich.console import Console

import eoi_jax as eoi
from eoi_jax._internal.files import atomic_savefig
from eoi_jax.typing import Array
from experiments.benchmarks.timing import haar, machine, medians, normal, sparse, tabulate

__all__ = ["Init", "bench_init", "plot"]

_SIZES = (128, 256, 512, 1024, 2048, 4096)
_DENSITIES = (2**-7, 2**-6, 2**-5, 2**-4, 0.1, 2**-3, 2**-2, 2**-1)


@dataclasses.dataclass(frozen=True)
class Init:
    """Draw matrices: time, compile time, memory, and a thousand kernels under vmap."""

    quick: bool = False
    """Only sizes up to 1024 and three densities."""
    repeats: int = 9
    """Runs of each function; the median is reported."""
    output: str = "benchmark_init.png"
    """Where the plot is saved."""


def bench_init(options: Init, console: Console) -> None:
    """Print the tables of ``init`` and save its plot."""
    sizes = _SIZES[:4] if options.quick else _SIZES
    densities = (2**-7, 0.1, 2**-1) if options.quick else _DENSITIES
    console.print(
        f"Median of {options.repeats} runs (at most 5 at n = 4096), float32, warm. {machine()}"
    )
    key = jax.random.key(0)
    seconds = {}
    for size in sizes:
        shape = (size, size)
        functions = {"normal": normal(shape), "haar": haar(shape)}
        reached = [d for d in densities if d * size >= 1]
        functions |= {f"{d}": sparse(shape, d) for d in reached}
        matching = eoi.planes.matching
        functions |= {f"{d} matching": sparse(shape, d, matching) for d in reached}
        calls = {name: functools.partial(f, key) for name, f in functions.items()}
        seconds[size] = medians(calls, options.repeats if size < 4096 else min(options.repeats, 5))

    names = ["normal", "haar", *map(str, densities)]
    heads = ["n", "normal", "orthogonal", *(f"d={density:.2g}" for density in densities)]
    for title, unit in (
        ("Time of one n x n matrix (ms); d: eoi.orthogonal at that density", None),
        ("The same over jax.random.normal", "normal"),
        ("The same over jax.nn.initializers.orthogonal", "haar"),
    ):
        rows = []
        for size, of_size in seconds.items():
            base = of_size[unit] if unit else 1e-3
            cells = (f"{of_size[name] / base:.2f}" if name in of_size else "–" for name in names)
            rows.append([str(size), *cells])
        console.print(tabulate(title, heads, rows))
    rows = [
        [str(size), *(_ratio(of_size, f"{d} matching", f"{d}") for d in densities)]
        for size, of_size in seconds.items()
    ]
    title = "planes=matching over independent planes"
    console.print(tabulate(title, [heads[0], *heads[3:]], rows))
    slower = [
        f"n = {size}, d = {density:.3g}"
        for size, of_size in seconds.items()
        for density in densities
        if of_size.get(f"{density}", 0.0) > of_size["haar"]
    ]
    console.print(f"Cells slower than orthogonal: {', '.join(slower) or 'none'}")
    _bench_compile(console, sizes, key)
    _bench_many(console, options.repeats)
    path = Path(options.output)
    atomic_savefig(path, plot(seconds, densities), dpi=120)
    console.print(f"Plot: {path}")


def _ratio(seconds: Mapping[str, float], name: str, other: str) -> str:
    return f"{seconds[name] / seconds[other]:.2f}" if name in seconds else "–"


def _bench_compile(console: Console, sizes: Sequence[int], key: Array) -> None:
    """Print compile time and memory of one program per size."""
    rows = []
    for size in sizes:
        jax.clear_caches()
        start = time.perf_counter()
        compiled = sparse((size, size), 0.1).lower(key).compile()
        seconds = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        temporary, output = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
        numbers = (seconds, temporary / 2**20, output / 2**20, temporary / output)
        rows.append([str(size), *(f"{number:.2f}" for number in numbers)])
    heads = ("n x n", "compile s", "temporary MiB", "output MiB", "ratio")
    console.print(tabulate("eoi.orthogonal, d = 0.1: compile time and memory", heads, rows))


def _bench_many(console: Console, repeats: int) -> None:
    """Print the time of a thousand kernels under vmap."""
    keys = jax.random.split(jax.random.key(0), 1000)
    shape = (128, 128)
    initializers = {
        "eoi.orthogonal, d = 0.1": lambda key: eoi.orthogonal(key, shape, 0.1),
        "the same, planes=matching": lambda key: eoi.orthogonal(
            key, shape, 0.1, planes=eoi.planes.matching
        ),
        "jax.random.normal": lambda key: jax.random.normal(key, shape),
        "jax.nn.initializers.orthogonal": lambda key: jax.nn.initializers.orthogonal()(key, shape),
    }
    calls = {
        name: functools.partial(jax.jit(jax.vmap(init)), keys)
        for name, init in initializers.items()
    }
    rows = [[name, f"{seconds:.3f}"] for name, seconds in medians(calls, repeats).items()]
    title = "1000 kernels of 128 x 128 under vmap"
    console.print(tabulate(title, ("initializer", "s"), rows, names=1))


def plot(seconds: Mapping[int, Mapping[str, float]], densities: Sequence[float]) -> Figure:
    """Plot time against size at density 0.1, and against density at the largest size.

    Args:
        seconds: By size and by name: ``"normal"``, ``"haar"`` and each density as a string.
        densities: The densities, 0.1 among them.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = list(seconds)
    styles = {
        "normal": {"label": "jax.random.normal", "color": "#000000", "linestyle": ":"},
        "haar": {
            "label": "jax.nn.initializers.orthogonal",
            "color": "#D55E00",
            "linestyle": "--",
        },
        "0.1": {"label": "eoi.orthogonal, density 0.1", "color": "#0072B2"},
    }
    for name, style in styles.items():
        left.plot(sizes, [1e3 * seconds[n][name] for n in sizes], marker="o", **style)
    left.set(xlabel="n of an n x n matrix", title="Time against size")
    size = sizes[-1]
    milliseconds = [1e3 * seconds[size][f"{density}"] for density in densities]
    right.plot(densities, milliseconds, color="#0072B2", marker="o", label="eoi.orthogonal")
    for name in ("normal", "haar"):
        right.axhline(1e3 * seconds[size][name], **styles[name])
    right.set(xlabel="density (fraction of non-zeros)", title=f"Time against density, n = {size}")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylabel="time (ms)")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_xticks(sizes, map(str, sizes))
    left.minorticks_off()
    figure.suptitle(machine(), fontsize=9)
    return figure
