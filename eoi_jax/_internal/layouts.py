"""The layers of a parameter tree: what shape each has, and how many of its weights it may keep."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from eoi_jax._internal import checks, selection, trees
from eoi_jax.typing import Densities, Layout, LayoutOf, Params

__all__ = ["Counts", "Geometry", "Kernel", "feasible", "kernels", "read"]

Counts: TypeAlias = NDArray[np.int64]
# Wider windows are no convolutions but channels in another order.
_LARGEST_WINDOW = 15


class Geometry(NamedTuple):
    """The axes of one layer: ``groups`` matrices of ``inputs x outputs`` at each of its taps."""

    taps: tuple[int, ...]
    inputs: int
    outputs: int
    groups: int
    transposed: bool = False

    @property
    def center(self) -> tuple[int, ...]:
        """The tap at which output and input grids align."""
        return tuple(size // 2 if self.transposed else (size - 1) // 2 for size in self.taps)

    @property
    def num_taps(self) -> int:
        """How many positions the window of a convolution has; 1 for a linear layer."""
        return math.prod(self.taps)

    @property
    def size(self) -> int:
        """How many weights the layer has."""
        return self.num_taps * self.inputs * self.outputs * self.groups

    @property
    def minimum(self) -> int:
        """How many non-zeros orthogonal matrices at one tap take."""
        return self.groups * min(self.inputs, self.outputs)

    @property
    def tall(self) -> tuple[int, int]:
        """The shape of each matrix, the longer side first."""
        return max(self.inputs, self.outputs), min(self.inputs, self.outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's kernel."""
        return (*self.taps, self.inputs, self.outputs * self.groups)


class Kernel(NamedTuple):
    """One kernel of a tree: a layer, or a stack of layers of one geometry."""

    name: str
    stack: tuple[int, ...]
    geometry: Geometry
    budgets: Counts  # one for each layer of the stack


def kernels(
    params: Params, densities: Densities, selected: Any, layout: LayoutOf | None
) -> list[Kernel | None]:
    """Read the kernels of a tree and their budgets; None for leaves that stay dense."""
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
    checked = trees.densities(densities, params, name="densities", tree_name="params")
    rows = zip(paths_and_leaves, checked, jax.tree.leaves(selected), strict=True)
    found: list[Kernel | None] = []
    for (path, leaf), density, is_kernel in rows:
        if not is_kernel or leaf.size == 0:
            found.append(None)
            continue
        name = trees.path_name(path)
        stack, geometry = read(path, leaf, layout)
        budgets = _budgets(density, stack, geometry.size, name)
        found.append(Kernel(name, tuple(stack), geometry, budgets))
    return found


def read(path: Any, leaf: Any, layout: LayoutOf | None) -> tuple[tuple[int, ...], Geometry]:
    """Read the shape of a kernel: the axes that stack its layers, and the geometry of a layer."""
    name = trees.path_name(path)
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"params[{name}] has dtype {leaf.dtype} and shape {leaf.shape}, outside the floating "
            "arrays of 2 or more axes. Let where= select kernels only."
        )
    own = trees.layout(layout, path, leaf)
    if layout is None:
        _unambiguous(path, leaf.shape, name)
    stack, shape = leaf.shape[: own.batch_axes], leaf.shape[own.batch_axes :]
    return stack, _geometry(shape, own, name)


def _unambiguous(path: Any, shape: tuple[int, ...], name: str) -> None:
    """Refuse shapes that may mean several things, where no layout tells which."""
    *taps, inputs, outputs = shape
    readings = ""
    if len(shape) == 3:
        readings = "a stack of layers, a 1-D convolution or attention"
    elif getattr(path[-1] if path else None, "name", None) == "weight" and taps:
        readings = "a kernel (outputs, inputs, *taps), as Equinox stores it, or (*taps, ...)"
    elif taps and max(taps) > _LARGEST_WINDOW:
        readings = f"a window of {' x '.join(map(str, taps))} or other axes"
    elif taps and inputs == 1 and outputs > 1:
        readings = "a depthwise convolution or one of a single input channel"
    if readings:
        raise ValueError(
            f"params[{name}] of shape {shape} is outside the kernels that a shape explains: "
            f"{readings}. Say which with layout=lambda path, leaf: Layout(batch_axes, groups), "
            "where what is left of the axes are (*taps, inputs, outputs); move them first if they "
            "are not."
        )


def feasible(found: list[Kernel | None], minimum: Any, *, redistribute: bool) -> list[Any]:
    """Return budgets of at least ``minimum(geometry)`` for every layer, with the same sum."""
    present = [kernel for kernel in found if kernel is not None]
    needs = [np.full_like(kernel.budgets, minimum(kernel.geometry)) for kernel in present]
    budget = np.concatenate([np.zeros(0, np.int64), *(kernel.budgets for kernel in present)])
    need = np.concatenate([np.zeros(0, np.int64), *needs])
    short = budget < need
    if short.any() and not redistribute:
        raise ValueError(_shortage(present, short, need))
    room = np.maximum(budget - need, 0)
    excess = int((need - budget)[short].sum())
    if excess > room.sum():
        sizes = sum(kernel.geometry.size * len(kernel.budgets) for kernel in present)
        raise ValueError(
            f"densities leave {budget.sum()} of {sizes} weights, outside [{need.sum()}, {sizes}]: "
            "orthogonal matrices need more non-zeros in all the layers together. Raise the density "
            f"to at least {need.sum() / sizes:.6g}."
        )
    if excess:
        given = selection.round_to_total(excess * (room / room.sum()), room, excess)
        budget = np.where(short, need, budget - given)
    parts = iter(np.split(budget, np.cumsum([len(kernel.budgets) for kernel in present])))
    return [None if kernel is None else next(parts) for kernel in found]


def _geometry(shape: tuple[int, ...], layout: Layout, name: str) -> Geometry:
    groups = layout.groups
    if len(shape) < 2:
        raise ValueError(
            f"layout({name}) leaves axes {shape} to a layer, outside (*taps, inputs, outputs). "
            "Count fewer batch_axes."
        )
    *taps, inputs, outputs = shape
    if outputs % groups:
        raise ValueError(
            f"layout({name}).groups={groups} is outside the divisors of {outputs} outputs. "
            "Every group has the same number of outputs."
        )
    geometry = Geometry(tuple(taps), inputs, outputs // groups, groups, layout.transposed)
    remedy = "Split the layer."
    high = selection.MAX_SIZE
    checks.integer(geometry.size, low=0, high=high, name=f"params[{name}].size", remedy=remedy)
    return geometry


def _budgets(density: Any, stack: tuple[int, ...], size: int, name: str) -> Counts:
    """Return the budget of each layer of a stack."""
    if checks.is_traced(density):
        remedy = "Budgets are computed on the host: compute the densities outside of jit."
        raise checks.value_error(f"densities[{name}]", density, "is being traced", remedy)
    if np.ndim(density) and np.shape(density) != stack:
        raise ValueError(
            f"densities[{name}] has shape {np.shape(density)}, outside {{(), {stack}}}, the axes "
            "that stack layers. Say with layout= which kernels are stacks."
        )
    layers = math.prod(stack)
    if np.ndim(density):
        return np.asarray(selection.budget(density, size), np.int64).reshape(layers)
    total = int(selection.budget(density, layers * size))
    share = np.full(layers, total // layers, np.int64)
    share[: total % layers] += 1
    return share


def _shortage(present: list[Kernel], short: Any, need: Any) -> str:
    """Say which layers have too small a budget."""
    lines = []
    index = 0
    for kernel in present:
        for layer, budget in enumerate(kernel.budgets):
            if short[index]:
                place = (int(axis) for axis in np.unravel_index(layer, kernel.stack))
                where = f"[{', '.join(map(str, place))}]" if kernel.stack else ""
                lines.append(
                    f"{kernel.name}{where}: {budget} of {kernel.geometry.size} weights, "
                    f"needs {need[index]}"
                )
            index += 1
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    listed = "\n  ".join(lines[:20])
    return (
        f"densities are outside what orthogonal matrices need in {len(lines)} layers:\n  {listed}"
        f'{more}\nRaise the density, give these layers more, or pass infeasible="redistribute" to '
        "take what they need from the other layers."
    )
