"""Shared by the benchmarks: medians of functions in turns, tables, and functions to time."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE
from rich.table import Table

import eoi_jax as eoi
from eoi_jax.typing import Array

__all__ = ["check_output", "haar", "machine", "medians", "normal", "sparse", "tabulate"]


def check_output(output: str) -> None:
    """Refuse a file that could not be written after minutes of measuring."""
    folder = Path(output).resolve().parent
    if not folder.is_dir():
        raise ValueError(
            f"output={output!r} is in a folder that does not exist. Create {folder}, or name "
            "another place."
        )


def medians(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    most_seconds: float = math.inf,
    twice: bool = False,
) -> dict[str, float]:
    """Run the functions in turns and return the median seconds of each.

    Taking turns lets a machine's drift in speed fall on all of them alike. The first turn compiles
    and is not counted.

    Args:
        functions: What to run, by name; all results are waited for.
        repeats: Turns that count, at least 1.
        most_seconds: A function that has run for so long in all takes no more turns, but for one
            that counts.
        twice: Whether each function runs twice in its turn, of which the second counts: as in a
            loop of its own, where caches and the allocator's memory are as it left them.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            if len(times[name]) >= 2 and (1 + twice) * sum(times[name]) >= most_seconds:
                continue
            if twice and turn > 0:
                jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def machine() -> str:
    """Name what the numbers were measured on."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{device.device_kind} x {jax.device_count()}, {cores} CPU cores, "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )


def tabulate(
    title: str, heads: Sequence[str], rows: Iterable[Iterable[str]], *, names: int = 0
) -> Table:
    """Build a table of numbers."""
    table = Table(title=title, box=SIMPLE)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def normal(shape: Sequence[int]) -> Callable[[Array], Array]:
    """Draw Gaussians, the cheapest start there is."""
    return jax.jit(lambda key: jax.random.normal(key, shape))


def haar(shape: Sequence[int]) -> Callable[[Array], Array]:
    """Draw a dense orthogonal matrix by QR, JAX's own initializer."""
    return jax.jit(lambda key: jax.nn.initializers.orthogonal()(key, shape))


def sparse(
    shape: Sequence[int], density: float, planes: eoi.planes.PlaneLaw = eoi.planes.independent
) -> Any:
    """Draw a sparse orthogonal matrix."""
    return jax.jit(lambda key: eoi.orthogonal(key, shape, density, planes=planes))
