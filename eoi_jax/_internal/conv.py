"""Kernels of convolutions made of one matrix: the taps of its entries, and its density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax.typing import Array, Shape

__all__ = [
    "Taps",
    "allowed_density",
    "at_center",
    "center_density",
    "center_tap",
    "check_strides",
    "check_taps",
    "drawn_density",
    "place",
    "strided",
]

Taps: TypeAlias = Literal["center", "spread", "spread_both"]
_STREAM = 0x74617073  # sets the taps' stream apart: the matrix of a key is that of every choice


def check_taps(taps: Any) -> None:
    """Require one of the choices of taps."""
    remedy = "'center' is the paper's, 'spread' gives each input channel a tap of its own."
    checks.one_of(taps, ("center", "spread", "spread_both"), name="taps", remedy=remedy)


def place(
    key: Array,
    matrix: Array,
    shape: Shape,
    taps: Taps,
    *,
    strides: Shape | None = None,
    transposed: bool = False,
) -> Array:
    """Return the kernel of ``shape`` that moves the channels of a matrix by whole pixels.

    With strides a matrix has a row for each input channel of each phase, a position of a pixel
    within a cell of ``strides``. The taps that see a phase are those of one remainder by the
    strides: a row stands at one of them, and taps that see the same phase differ by whole cells.
    """
    *window, inputs, outputs = shape
    if strides is None and taps == "center":
        return at_center(matrix, shape, transposed=transposed)
    steps = [1] * len(window) if strides is None else strides
    cell, center = math.prod(steps), center_tap(window, transposed=transposed)
    phases = np.stack([axis.ravel() for axis in np.indices(tuple(steps))], axis=1)
    row_keys, column_keys = jax.random.split(jax.random.fold_in(key, _STREAM))
    index: Any = 0
    for axis, (size, step) in enumerate(zip(window, steps, strict=True)):
        phase = np.repeat(phases[:, axis], inputs)[:, None]
        number = (size - 1 - phase) // step + 1  # of the taps that see the phase
        if taps == "center":
            nearest = np.clip(np.round((center[axis] - phase) / step), 0, number - 1)
            cells: Any = nearest.astype(np.int32)
        elif taps == "spread_both" and axis > 0:
            axis_key = jax.random.fold_in(column_keys, axis)
            cells = jax.random.randint(axis_key, (1, outputs), 0, size // step)
        else:
            axis_key = jax.random.fold_in(row_keys, axis)
            cells = jax.random.randint(axis_key, (cell * inputs, 1), 0, number)
        index = index * size + phase + step * cells
    channel = np.tile(np.arange(inputs), cell)[:, None]
    kernel = jnp.zeros((math.prod(window), inputs, outputs), matrix.dtype)
    places = (index, channel, np.arange(outputs)[None])
    return kernel.at[places].set(matrix, unique_indices=True).reshape(shape)


def center_tap(taps: Shape, *, transposed: bool = False) -> tuple[int, ...]:
    """Return the tap at which the grids of inputs and outputs align, for windows of any size."""
    return tuple(size // 2 if transposed else (size - 1) // 2 for size in taps)


def at_center(tap: Array, shape: Shape, *, transposed: bool = False) -> Array:
    """Return the kernel of ``shape`` that is zero but for its center tap."""
    center = center_tap(shape[:-2], transposed=transposed)
    return jnp.zeros(shape, tap.dtype).at[center].set(tap)


def center_density(density: Any, num_taps: float, *, step: float = 0.0) -> Any:
    """Return ``min(density * num_taps - step, sqrt(density), 1)``, the density of a center tap.

    The first term is what the whole kernel's count allows. ``step`` is left free below it where a
    draw may end above its target by as much; a dense kernel has nothing to leave.
    """
    numpy: Any = jnp if checks.is_traced(density) else np
    room = allowed_density(density, num_taps, step)
    return numpy.minimum(numpy.minimum(room, numpy.sqrt(density)), 1.0)


def allowed_density(density: Any, num_taps: float, step: float) -> Any:
    """Return the density of a center tap that the whole kernel's allows, less a step."""
    numpy: Any = jnp if checks.is_traced(density) else np
    return density * num_taps - numpy.where(density < 1, step, 0.0)


def drawn_density(density: Any, num_taps: float, size: int, minimum: Any = None) -> Any:
    """Return the density to draw a center tap of larger side ``size`` at.

    The draw ends up to half a step, ``1 / (2 size)``, from its target. That room is left, so that
    the count of the whole kernel is never exceeded, to which no support could be trimmed. It is at
    least ``minimum``: by default the ``1 / size`` of an orthogonal matrix.
    """
    minimum = 1 / size if minimum is None else minimum
    rule = center_density(density, num_taps, step=1 / (2 * size))
    if checks.is_traced(density) or checks.is_traced(minimum):
        return jnp.maximum(rule, minimum)
    return max(float(rule), minimum)


def check_strides(
    strides: Any, window: Shape, *, transposed: bool = False, name: str = "strides"
) -> tuple[int, ...] | None:
    """Accept strides, one for each axis of a window that covers them; None if all are 1."""
    steps: tuple[int, ...] = (
        tuple(strides) if isinstance(strides, Sequence) else (strides,) * len(window)
    )
    if len(steps) != len(window):
        problem = f"has {len(steps)} entries, not {len(window)}"
        raise checks.value_error(name, steps, problem, "Give one an axis.")
    for axis, (size, step) in enumerate(zip(window, steps, strict=True)):
        of_axis = f"{name}[{axis}]" if isinstance(strides, Sequence) else name
        checks.integer(step, low=1, name=of_axis)
        remedy = "A window smaller than its stride skips pixels: use a larger window."
        checks.integer(step, low=1, high=size, name=of_axis, remedy=remedy)
    if all(step == 1 for step in steps):
        return None
    if transposed:
        remedy = "Draw transposed kernels at stride 1."
        raise checks.value_error(name, steps, "is not 1 with transposed=True", remedy)
    return steps


def strided(inputs: Array, strides: Any) -> Array:
    """Keep the pixels of ``(..., *spatial, channels)`` that a window of one tap meets."""
    remedy = "Give one stride for each spatial axis, such as (2, 2)."
    if not isinstance(strides, Sequence) or isinstance(strides, str) or not strides:
        raise checks.value_error("strides", strides, "is not a sequence of ints", remedy)
    steps = [checks.integer(step, low=1, name="strides", remedy=remedy) for step in strides]
    if jnp.ndim(inputs) <= len(steps):
        problem = f"has no {len(steps)} spatial axes before its channels"
        raise checks.value_error("inputs.shape", jnp.shape(inputs), problem, remedy)
    return inputs[(..., *(slice(None, None, step) for step in steps), slice(None))]
