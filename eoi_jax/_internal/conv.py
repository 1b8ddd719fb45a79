"""Kernels of convolutions with one matrix at their center tap: which tap it is, and how dense."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax.typing import Array, Shape

__all__ = ["at_center", "center_density", "center_tap", "drawn_density"]


def center_tap(taps: Shape, *, transposed: bool = False) -> tuple[int, ...]:
    """Return the tap at which the grids of inputs and outputs align, for windows of any size."""
    return tuple(size // 2 if transposed else (size - 1) // 2 for size in taps)


def at_center(tap: Array, shape: Shape, *, transposed: bool = False) -> Array:
    """Return the kernel of ``shape`` that is zero but for its center tap."""
    center = center_tap(shape[:-2], transposed=transposed)
    return jnp.zeros(shape, tap.dtype).at[center].set(tap)


def center_density(density: Any, num_taps: int, *, step: float = 0.0) -> Any:
    """Return ``min(density * num_taps - step, sqrt(density), 1)``, the density of a center tap.

    The first term is what the whole kernel's count allows. ``step`` is left free below it where a
    draw may end above its target by as much; a dense kernel has nothing to leave.
    """
    numpy: Any = jnp if checks.is_traced(density) else np
    room = density * num_taps - numpy.where(density < 1, step, 0.0)
    return numpy.minimum(numpy.minimum(room, numpy.sqrt(density)), 1.0)


def drawn_density(density: Any, num_taps: int, size: int) -> Any:
    """Return the density to draw a center tap of larger side ``size`` at.

    The draw ends up to half a step, ``1 / (2 size)``, from its target. That room is left, so that
    the count of the whole kernel is never exceeded, to which no support could be trimmed. An
    orthogonal matrix has at least the density ``1 / size``.
    """
    minimum = 1 / size
    rule = center_density(density, num_taps, step=minimum / 2)
    return jnp.maximum(rule, minimum) if checks.is_traced(density) else max(float(rule), minimum)
