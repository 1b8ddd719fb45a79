"""What the benchmarks share: medians of functions in turns, and the starts to compare with."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import eoi_jax as eoi
from eoi_jax.typing import Array

__all__ = ["check", "haar", "machine", "medians", "normal", "sparse"]


def check(repeats: int, output: str | None) -> None:
    """Refuse settings that would only fail after minutes of measuring.

    Raises:
        ValueError: naming the setting, its value, the allowed range and the remedy.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} is outside [1, ...). Give a larger number.")
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise ValueError(f"output={output!r} is in a folder that does not exist. Create it first.")


def medians(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Run the functions in turns and return the median seconds of each.

    Taking turns lets a machine's drift in speed fall on all of them alike. The first turn compiles
    and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def machine() -> str:
    """Name what the numbers were measured on."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{device.device_kind} x {jax.device_count()}, {cores} CPU cores, "
        f"Python {platform.python_version()}, jax {jax.__version__}"
    )


def normal(shape: Sequence[int]) -> Callable[[Array], Array]:
    """Draw Gaussians, the cheapest start there is."""
    return jax.jit(lambda key: jax.random.normal(key, shape))


def haar(shape: Sequence[int]) -> Callable[[Array], Array]:
    """Draw a dense orthogonal matrix by QR, JAX's own initializer."""
    return jax.jit(lambda key: jax.nn.initializers.orthogonal()(key, shape))


def sparse(shape: Sequence[int], density: float) -> Any:
    """Draw a sparse orthogonal matrix."""
    return jax.jit(lambda key: eoi.orthogonal(key, shape, density))
