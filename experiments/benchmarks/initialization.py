"""Time of drawing matrices, and of a training step under a mask against the dense step."""

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
from experiments.benchmarks.timing import haar, machine, medians, normal, sparse

DENSITIES = (2**-7, 2**-6, 2**-5, 2**-4, 0.1, 2**-3, 2**-2, 2**-1)


@dataclasses.dataclass(frozen=True)
class Init:
    """Draw matrices: time, compile time, memory, and a thousand kernels under vmap."""

    quick: bool = False
    """Sizes to 1024 and three densities only."""
    repeats: int = 9
    """Runs of each function, of which the median counts."""
    output: str = "benchmark_init.png"
    """Where the plot is saved."""


@dataclasses.dataclass(frozen=True)
class Optim:
    """Train under a mask: time of a step with static_sparse against the dense step."""

    repeats: int = 31
    """Runs of each function, of which the median counts."""


def bench_init(options: Init, console: Console) -> None:
    """Print the tables of ``init`` and save its plot."""
    sizes = (128, 256, 512, 1024) if options.quick else (128, 256, 512, 1024, 2048, 4096)
    densities = (2**-7, 0.1, 2**-1) if options.quick else DENSITIES
    console.print(
        f"Median of {options.repeats} runs (at most 5 at n = 4096), float32, warm. {machine()}"
    )
    key = jax.random.key(0)
    rows = {}
    for size in sizes:
        feasible = [density for density in densities if density * size >= 1]
        functions = {"normal": normal((size, size)), "haar": haar((size, size))}
        functions |= {f"{d}": sparse((size, size), d) for d in feasible}
        calls = {name: functools.partial(f, key) for name, f in functions.items()}
        rows[size] = medians(calls, options.repeats if size < 4096 else min(options.repeats, 5))

    names = ["normal", "haar", *(f"{density}" for density in densities)]
    heads = ["normal", "orthogonal", *(f"d={density:.2g}" for density in densities)]
    for title, unit in (
        ("Time of one n x n matrix (ms); d: eoi.orthogonal at that density", None),
        ("The same over jax.random.normal", "normal"),
        ("The same over jax.nn.initializers.orthogonal", "haar"),
    ):
        table = Table(title=title, box=SIMPLE)
        for head in ("n", *heads):
            table.add_column(head, justify="right", no_wrap=True)
        for size, own in rows.items():
            base = own[unit] if unit else 1e-3
            table.add_row(
                str(size), *(f"{own[name] / base:.2f}" if name in own else "–" for name in names)
            )
        console.print(table)
    slower = [
        f"n = {size}, d = {density:.3g}"
        for size, own in rows.items()
        for density in densities
        if own.get(f"{density}", 0.0) > own["haar"]
    ]
    console.print(f"Cells slower than orthogonal: {', '.join(slower) or 'none'}")
    bench_compile(console, sizes, key)
    bench_many(console, options.repeats)
    console.print(f"Plot: {plot_init(rows, densities, options.output)}")


def bench_compile(console: Console, sizes: Sequence[int], key: Array) -> None:
    """Print compile time and memory of one program per size."""
    table = Table(title="eoi.orthogonal, d = 0.1: compile time and memory", box=SIMPLE)
    for column in ("n x n", "compile s", "temporary MiB", "output MiB", "ratio"):
        table.add_column(column, justify="right")
    for size in sizes:
        jax.clear_caches()
        start = time.perf_counter()
        compiled = sparse((size, size), 0.1).lower(key).compile()
        seconds = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        temporary, output = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
        table.add_row(
            str(size),
            f"{seconds:.2f}",
            f"{temporary / 2**20:.2f}",
            f"{output / 2**20:.2f}",
            f"{temporary / output:.2f}",
        )
    console.print(table)


def bench_many(console: Console, repeats: int) -> None:
    """Print the time of a thousand kernels under vmap."""
    keys = jax.random.split(jax.random.key(0), 1000)
    shape = (128, 128)
    calls = {
        "eoi.orthogonal, d = 0.1": lambda key: eoi.orthogonal(key, shape, 0.1),
        "jax.random.normal": lambda key: jax.random.normal(key, shape),
        "jax.nn.initializers.orthogonal": lambda key: jax.nn.initializers.orthogonal()(key, shape),
    }
    own = medians(
        {name: functools.partial(jax.jit(jax.vmap(f)), keys) for name, f in calls.items()}, repeats
    )
    table = Table(title="1000 kernels of 128 x 128 under vmap", box=SIMPLE)
    table.add_column("initializer")
    table.add_column("s", justify="right")
    for name, seconds in own.items():
        table.add_row(name, f"{seconds:.3f}")
    console.print(table)


def plot_init(rows: dict[int, dict[str, float]], densities: Sequence[float], output: str) -> Path:
    """Plot time against size for a few densities and against density for the largest size."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    looks = {
        "normal": ("jax.random.normal", "#000000", ":"),
        "haar": ("jax.nn.initializers.orthogonal", "#D55E00", "--"),
        "0.1": ("eoi.orthogonal, density 0.1", "#0072B2", "-"),
    }
    sizes = list(rows)
    for name, (label, color, style) in looks.items():
        own = [rows[size][name] * 1e3 for size in sizes]
        left.plot(sizes, own, style, color=color, marker="o", label=label)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="n of an n x n matrix",
        ylabel="time (ms)",
        title="Time against size",
    )
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.minorticks_off()
    left.legend()
    size = sizes[-1]
    own = [rows[size][f"{density}"] * 1e3 for density in densities]
    right.plot(densities, own, "-", color="#0072B2", marker="o", label="eoi.orthogonal")
    for name in ("normal", "haar"):
        label, color, style = looks[name]
        right.axhline(rows[size][name] * 1e3, color=color, linestyle=style, label=label)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="density (fraction of non-zeros)",
        ylabel="time (ms)",
        title=f"Time against density, n = {size}",
    )
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(machine(), fontsize=9)
    path = Path(output)
    figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")
    plt.close(figure)
    return path


def bench_optim(options: Optim, console: Console) -> None:
    """Print the time of whole training steps and of optimizer updates alone, masked and dense."""
    console.print(f"Median of {options.repeats} runs. {machine()}")
    model = models.Mlp(depth=102, width=256, num_classes=10, kernel_init=eoi.dense(0.1))
    images = jax.random.normal(jax.random.key(0), (128, 16, 16, 1))
    labels = jnp.zeros((128,), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(1), images)
    mask = eoi.masks.support(params)

    def loss_fn(params: Any) -> Array:
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def update(tx: optax.GradientTransformation) -> Callable[..., Any]:
        def call(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return call

    def step(tx: optax.GradientTransformation) -> Callable[..., Any]:
        return lambda params, state, grads: update(tx)(params, state, jax.grad(loss_fn)(params))

    table = Table(
        title="static_sparse against the bare optimizer: 102 x 256 wide, batch 128, density 0.1",
        box=SIMPLE,
    )
    table.add_column("optimizer")
    for column in ("dense step ms", "masked ms", "ratio", "dense update ms", "masked ms", "ratio"):
        table.add_column(column, justify="right")
    optimizers = {
        "sgd, Nesterov": optax.sgd(1e-3, momentum=0.9, nesterov=True),
        "adamw": optax.adamw(1e-3),
    }
    grads = jax.grad(loss_fn)(params)
    for name, inner in optimizers.items():
        masked = eoi.static_sparse(inner, mask)
        calls = {
            (kind, which): functools.partial(jax.jit(make(tx)), params, tx.init(params), grads)
            for kind, make in (("step", step), ("update", update))
            for which, tx in (("dense", inner), ("masked", masked))
        }
        own = medians({f"{k} {w}": call for (k, w), call in calls.items()}, options.repeats)
        cells = []
        for kind in ("step", "update"):
            dense, sparse_ = own[f"{kind} dense"], own[f"{kind} masked"]
            cells += [f"{dense * 1e3:.1f}", f"{sparse_ * 1e3:.1f}", f"{sparse_ / dense:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
