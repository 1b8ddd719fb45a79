"""Time to initialize: whole networks with each method, and one matrix with EOI, SAO, AI and QR."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import optax
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import eoi_jax as eoi
from eoi_jax.typing import Array
from experiments import models
from experiments.benchmarks.timing import haar, machine, medians, sparse

__all__ = ["Methods", "bench_methods", "seconds_of"]

SIZES = (2**7, 2**8, 2**9, 2**10, 2**11, 2**12)
DENSITIES = (2**-7, 2**-6, 2**-5, 2**-4, 2**-3, 2**-2, 2**-1)
# The paper's density and steps of AI for each network.
NETWORKS = {"mlp7": (0.1, 10_000), "resnet32": (0.1, 10_000), "mlp1000": (0.125, 1_000)}
LONG = 60.0  # seconds: a longer call is run only once


@dataclasses.dataclass(frozen=True)
class Methods:
    """Initialize networks with every method, and matrices with EOI, SAO, AI and QR."""

    quick: bool = False
    """MLP-7 and sizes to 512 only, and 100 steps of AI."""
    networks: bool = True
    """Time the networks."""
    matrices: bool = True
    """Time the matrices."""
    repeats: int = 5
    """Runs of each matrix, of which the median counts."""
    output: str = "benchmark_methods.png"
    """Where the plot is saved."""


def bench_methods(options: Methods, console: Console) -> None:
    """Print the tables of ``methods`` and save its plot."""
    console.print(machine())
    if options.networks:
        bench_networks(options, console)
    if options.matrices:
        bench_matrices(options, console)


def starts(name: str, density: float, steps: int) -> dict[str, Callable[[], Any]]:
    """Return every method as a function without arguments, from a dense start to the sparse one."""
    model: Any = models.create(name)
    key = jax.random.key(0)
    images = jax.random.normal(key, (128, *models.input_shape(name)))
    labels = jnp.arange(128) % 10
    variables = jax.jit(model.init)(key, images[:1])
    # SynFlow needs a positively homogeneous network.
    flow: Any = models.create(name, activation="identity") if name.startswith("mlp") else model

    def logits(variables: Any, images: Array) -> Array:
        return model.apply(variables, images)

    def loss_fn(variables: Any, images: Array, labels: Array, temperature: float = 1.0) -> Array:
        own = logits(variables, images) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(own, labels).mean()

    grasp_loss = functools.partial(loss_fn, temperature=200.0)
    snip = jax.jit(lambda v: eoi.criteria.snip(loss_fn, v, images, labels))
    grasp = jax.jit(
        lambda v: eoi.criteria.grasp(grasp_loss, v, images, labels, micro_batch_size=32)
    )

    def score(variables: Any) -> Any:
        return eoi.criteria.synflow(
            flow.apply, variables, images[:1].astype(jnp.result_type(float))
        )

    def synflow() -> Any:
        if name.startswith("mlp"):
            mask = eoi.criteria.prune(
                score, variables, density, num_steps=100, layout=models.layout
            )
            return eoi.masked(variables, mask)
        # A residual network has no factor to scale away: its flow needs the range of float64.
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
            mask = eoi.criteria.prune(score, wide, density, num_steps=100)
        return eoi.masked(variables, mask)

    def densities() -> Any:
        return eoi.budgets.erdos_renyi_kernel(variables, density, layout=models.layout)

    def top(scores: Any) -> Any:
        return eoi.masked(variables, eoi.masks.top_k(scores, density))

    def random_mask() -> Any:
        return eoi.masks.random(key, variables, densities())

    return {
        "dense orthogonal (QR)": lambda: eoi.networks.redraw(
            key, variables, _orthogonal, layout=models.layout
        ),
        "ERK, random mask (Base)": lambda: eoi.masked(variables, random_mask()),
        "magnitude (Base)": lambda: top(eoi.criteria.magnitude(variables)),
        "SNIP (Base)": lambda: top(snip(variables)),
        "GraSP (Base)": lambda: top(grasp(variables)),
        "SynFlow, 100 rounds (Base)": synflow,
        "ERK, EOI": lambda: eoi.exact_orthogonal(
            key, variables, densities(), infeasible="redistribute", layout=models.layout
        ),
        "SAO": lambda: eoi.sparsity_aware_orthogonal(key, variables, density, layout=models.layout),
        f"ERK, AI ({steps:,} steps)": lambda: eoi.approximate_isometry(
            variables, random_mask(), num_steps=steps, layout=models.layout
        ),
    }


def _orthogonal(
    key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
) -> Array:
    """Draw Haar matrices for linear layers and delta kernels of them for convolutions."""
    del out_sharding
    if len(shape) > 2:
        return eoi.initializers.delta_orthogonal()(key, shape, dtype)
    return jax.nn.initializers.orthogonal()(key, shape, dtype)


def bench_networks(options: Methods, console: Console) -> None:
    """Print the seconds that each method takes to initialize each network."""
    names = ("mlp7",) if options.quick else tuple(NETWORKS)
    cells: dict[str, dict[str, tuple[str, str]]] = {}
    for name in names:
        density, steps = NETWORKS[name]
        for method, start in starts(name, density, 100 if options.quick else steps).items():
            row = method if "AI" not in method else "ERK, AI"
            cells.setdefault(row, {})[name] = _first_and_warm(start)
            jax.clear_caches()
    table = Table(
        title="Seconds to initialize a network: first call (with compilation) / again", box=SIMPLE
    )
    table.add_column("method", no_wrap=True)
    for name in names:
        density, steps = NETWORKS[name]
        table.add_column(f"{name}, density {density}", justify="right")
    for method, seconds in cells.items():
        table.add_row(method, *(" / ".join(seconds[name]) for name in names))
    console.print(table)
    taken = ", ".join(f"{100 if options.quick else NETWORKS[name][1]:,} ({name})" for name in names)
    console.print(
        f"Steps of AI: {taken}. A call of more than {LONG:.0f} s is not repeated (…). "
        "An empty cell: the method cannot do it."
    )


def _first_and_warm(start: Callable[[], Any]) -> tuple[str, str]:
    """Time a method twice: once with compilation, once without."""
    seconds: list[float] = []
    for _ in range(2):
        begin = time.perf_counter()
        try:
            jax.block_until_ready(start())
        except ValueError as error:
            if "does not suit the method" not in str(error):
                raise
            return "–", "–"
        seconds.append(time.perf_counter() - begin)
        if seconds[0] > LONG:
            return f"{seconds[0]:.0f}", "…"
    return f"{seconds[0]:.2g}", f"{seconds[1]:.2g}"


def bench_matrices(options: Methods, console: Console) -> None:
    """Print the milliseconds of one matrix with each method over sizes and densities."""
    rows = {
        (size, density): own
        for size in (SIZES[:3] if options.quick else SIZES)
        for density, own in seconds_of(size, DENSITIES, options.repeats).items()
    }
    table = Table(title="Milliseconds to draw one n x n matrix of density d", box=SIMPLE)
    heads = ("n", "d", "EOI", "QR", "SAO", "one step of AI", "QR / EOI", "EOI in steps of AI")
    for head in heads:
        table.add_column(head, justify="right")
    for (size, density), row in rows.items():
        cells = [row["EOI"], row["QR"], row["SAO"], row["AI"]]
        table.add_row(
            str(size),
            f"1/{round(1 / density)}",
            *("–" if cell != cell else f"{1e3 * cell:.3g}" for cell in cells),
            f"{row['QR'] / row['EOI']:.1f}",
            f"{row['EOI'] / row['AI']:.2g}",
        )
    console.print(table)
    slower = [f"n = {n}, d = {d:.3g}" for (n, d), row in rows.items() if row["EOI"] > row["QR"]]
    steps = max(row["EOI"] / row["AI"] for row in rows.values())
    console.print(
        f"Cells where EOI is slower than QR: {', '.join(slower) or 'none'}. No draw of EOI takes "
        f"longer than {steps:.1f} steps of AI; the paper takes 10,000. QR and a step of AI "
        "do not depend on the density. SAO has no degree below 2."
    )
    console.print(f"Plot: {plot_matrices(rows, options.output)}")


def seconds_of(
    size: int, densities: Sequence[float], repeats: int
) -> dict[float, dict[str, float]]:
    """Time one ``size x size`` matrix with each method, all of them in turns.

    Args:
        size: rows and columns.
        densities: fractions of non-zeros; those below one non-zero a row are left out.
        repeats: runs of each, of which the median counts; at most 3 from size 4096 on and of AI.

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
            calls[f"SAO {density}"] = functools.partial(_sao(size, degree), key)
    own = medians(calls, repeats)
    step = _seconds_of_a_step(size, repeats)
    return {
        density: {
            "EOI": own[f"EOI {density}"],
            "SAO": own.get(f"SAO {density}", float("nan")),
            "AI": step,
            "QR": own["QR"],
        }
        for density in feasible
    }


def _sao(size: int, degree: int) -> Callable[[Array], Array]:
    """Draw a block-diagonal matrix of Haar blocks with permuted rows and columns."""
    return jax.jit(lambda key: eoi.sao.orthogonal(key, size, degree))


def _seconds_of_a_step(size: int, repeats: int) -> float:
    """Time one descent step of AI: the difference of a long run and a short one, by its length."""
    kernel = jax.random.normal(jax.random.key(1), (size, size)) / size**0.5
    mask = jax.random.bernoulli(jax.random.key(2), 0.125, (size, size))
    few, many = (1, 101) if size <= 512 else (1, 11) if size <= 1024 else (1, 3)

    def run(steps: int) -> Callable[[], Array]:
        solve = jax.jit(functools.partial(eoi.isometry.approximate_isometry, num_steps=steps))
        return functools.partial(solve, kernel, mask)

    own = medians({"few": run(few), "many": run(many)}, min(repeats, 3))
    return (own["many"] - own["few"]) / (many - few)


def plot_matrices(rows: dict[tuple[int, float], dict[str, float]], output: str) -> Path:
    """Plot time against size at one density, and against density at one size."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    looks = {
        "EOI": ("EOI", "#0072B2", "-", "o"),
        "QR": ("dense orthogonal (QR)", "#D55E00", "--", "s"),
        "SAO": ("SAO", "#009E73", "-.", "^"),
        "AI": ("AI, 10,000 times one measured step", "#000000", ":", "x"),
    }
    sizes = sorted({size for size, _ in rows})
    density, size = 0.125, max(n for n in sizes if n <= 1024)
    densities = sorted(d for n, d in rows if n == size)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for name, (label, color, style, marker) in looks.items():
        factor = 10_000 if name == "AI" else 1
        for own, xs, cells in (
            (axes[0], sizes, [(n, density) for n in sizes]),
            (axes[1], densities, [(size, d) for d in densities]),
        ):
            ys = [rows[cell][name] * factor for cell in cells]
            own.plot(xs, ys, style, color=color, marker=marker, label=label)
    axes[0].set(
        xlabel="n of an n x n matrix", ylabel="time (s)", title=f"Against size, density {density}"
    )
    axes[1].set(xlabel="density (fraction of non-zeros)", title=f"Against density, n = {size}")
    for own, ticks, labels in (
        (axes[0], sizes, [str(n) for n in sizes]),
        (axes[1], densities, [f"1/{round(1 / d)}" for d in densities]),
    ):
        own.set(xscale="log", yscale="log")
        own.set_xticks(ticks, labels)
        own.minorticks_off()
        own.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(machine(), fontsize=9)
    path = Path(output)
    figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")
    plt.close(figure)
    return path
