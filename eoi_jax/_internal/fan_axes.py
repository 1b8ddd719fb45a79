"""Which axes of a kernel are inputs, outputs and batch axes, as in JAX's initializers.

Every kernel is converted to the axes ``(*taps, inputs, outputs)``, and back. Axes that no argument
names are taps, the window of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax.typing import Array

__all__ = ["AxisNames", "FanAxes", "View", "check", "resolve", "side_by_side"]

AxisNames: TypeAlias = int | Sequence[int]


class FanAxes(NamedTuple):
    """The axes of one layer's kernel, counted from its first."""

    taps: tuple[int, ...]
    inputs: tuple[int, ...]
    batch: tuple[int, ...]
    outputs: tuple[int, ...]


class View(NamedTuple):
    """How the axes of an array are read: leading ones that stack layers, and those of a layer."""

    shape: tuple[int, ...]
    stacked: int  # how many leading axes stack layers
    axes: FanAxes

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes that stack layers."""
        return self.shape[: self.stacked]

    @property
    def taps(self) -> tuple[int, ...]:
        """The window of each matrix."""
        return self._sizes(self.axes.taps)

    @property
    def inputs(self) -> int:
        """How many inputs each matrix has, without the taps."""
        return math.prod(self._sizes(self.axes.inputs))

    @property
    def matrices(self) -> int:
        """How many matrices the batch axes of a layer hold."""
        return math.prod(self._sizes(self.axes.batch))

    @property
    def outputs(self) -> int:
        """How many outputs each matrix has, those of all groups."""
        return math.prod(self._sizes(self.axes.outputs))

    def layers(self, array: Any) -> Any:
        """Return an array as ``(layers, *taps, inputs, matrices * outputs)``."""
        shape = (math.prod(self.stack), *self.taps, self.inputs, self.matrices * self.outputs)
        return self._ordered(array).reshape(shape)

    def from_layers(self, layers: Any) -> Any:
        """Undo :meth:`layers`."""
        order = self._order()
        ordered = layers.reshape(tuple(self.shape[axis] for axis in order))
        if order == tuple(range(len(self.shape))):
            return ordered
        return ordered.transpose(tuple(int(axis) for axis in np.argsort(order)))

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """Join matrices ``(layers * matrices, *taps, inputs, outputs)`` into the array."""
        shape = (math.prod(self.stack), self.matrices, *self.taps, self.inputs, self.outputs)
        return self.from_layers(jnp.moveaxis(matrices.reshape(shape), 1, -2))

    def _ordered(self, array: Any) -> Any:
        order = self._order()
        return array if order == tuple(range(len(self.shape))) else array.transpose(order)

    def _order(self) -> tuple[int, ...]:
        taps, inputs, batch, outputs = self.axes
        stack = tuple(range(self.stacked))
        return (*stack, *(self.stacked + axis for axis in (*taps, *inputs, *batch, *outputs)))

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[self.stacked + axis] for axis in axes)


def check(value: Any, name: str) -> tuple[int, ...]:
    """Accept one axis or several, of a kernel whose shape is not known yet."""
    remedy = "Give an axis, or a sequence of them."
    try:
        several = isinstance(value, Sequence) and not isinstance(value, str)
        return tuple(
            checks.integer(axis, low=-(2**31), name=name)
            for axis in (value if several else [value])
        )
    except ValueError:
        raise checks.value_error(name, value, "is outside the axes", remedy) from None


def resolve(in_axis: Any, out_axis: Any, batch_axis: Any, ndim: int, *, name: str = "") -> FanAxes:
    """Accept the axes of a kernel of ``ndim`` axes, no axis twice; ``name`` is their prefix."""
    given = {"in_axis": in_axis, "out_axis": out_axis, "batch_axis": batch_axis}
    found: dict[str, tuple[int, ...]] = {}
    roles: dict[int, str] = {}
    for role, value in given.items():
        axes = check(value, f"{name}{role}")
        if not axes and role != "batch_axis":
            remedy = "Give an axis, or a sequence of them."
            raise checks.value_error(f"{name}{role}", value, "names no axis", remedy)
        found[role] = tuple(checks.axis(axis, ndim, f"{name}{role}") for axis in axes)
        for axis in found[role]:
            if axis in roles:
                raise checks.value_error(
                    f"{name}{role}",
                    value,
                    f"names axis {axis} of {ndim} again, which {roles[axis]}={given[roles[axis]]} "
                    "has",
                    "Give each axis one meaning: in_axis, out_axis and batch_axis together.",
                )
            roles[axis] = role
    taps = tuple(axis for axis in range(ndim) if axis not in roles)
    return FanAxes(taps, found["in_axis"], found["batch_axis"], found["out_axis"])


def side_by_side(init: Callable[[Array], Array], fused: int) -> Callable[[Array], Array]:
    """Draw so many kernels, and put them side by side along the last axis."""

    def draw(key: Array) -> Array:
        kernels = jnp.moveaxis(jax.vmap(init)(jax.random.split(key, fused)), 0, -2)
        return kernels.reshape(*kernels.shape[:-2], -1)

    return draw
