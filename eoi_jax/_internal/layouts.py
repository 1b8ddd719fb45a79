"""The layers of a parameter tree: their shapes, and how many weights each may keep."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from eoi_jax._internal import checks, fan_axes, names, selection, shardings, trees
from eoi_jax._internal.conv import center_tap
from eoi_jax.typing import Densities, Layout, LayoutOf, Mask, Params

__all__ = ["Counts", "Geometry", "Kernel", "feasible", "kernels", "place", "place_mask", "read"]

Counts: TypeAlias = NDArray[np.int64]


class Geometry(NamedTuple):
    """The axes of one layer: ``groups`` matrices of ``inputs x outputs`` at each of its taps."""

    taps: tuple[int, ...]
    inputs: int
    outputs: int
    groups: int
    transposed: bool = False
    strides: tuple[int, ...] | None = None  # where a matrix has rows for all phases of the input

    @property
    def rows(self) -> int:
        """How many rows each matrix has: the input channels of each phase."""
        return self.inputs * math.prod(self.strides or ())

    @property
    def center(self) -> tuple[int, ...]:
        """The tap at which output and input grids align."""
        return center_tap(self.taps, transposed=self.transposed)

    @property
    def num_taps(self) -> int:
        """How many positions the window of a convolution has; 1 for a linear layer."""
        return math.prod(self.taps)

    @property
    def matrices_per_kernel(self) -> float:
        """How many matrices have room in the kernel: the taps, or their share of each phase."""
        return self.num_taps / math.prod(self.strides or ())

    @property
    def size(self) -> int:
        """How many weights the layer has."""
        return self.num_taps * self.inputs * self.outputs * self.groups

    @property
    def minimum(self) -> int:
        """How many non-zeros orthogonal matrices take."""
        return self.groups * min(self.rows, self.outputs)

    @property
    def tall(self) -> tuple[int, int]:
        """The shape of each matrix, the longer side first."""
        return max(self.rows, self.outputs), min(self.rows, self.outputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's kernel."""
        return (*self.taps, self.inputs, self.outputs * self.groups)


class Kernel(NamedTuple):
    """One kernel of a tree: a layer, or a stack of layers of one geometry."""

    name: str
    view: fan_axes.View
    geometry: Geometry
    counts: Counts  # of non-zeros, one for each layer of the stack


def kernels(
    params: Params, densities: Densities, selected: Any, layout: LayoutOf | None
) -> list[Kernel | None]:
    """Read the kernels of a tree and the counts of their layers; None for dense leaves."""
    layout = names.known(layout, params)
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(params)
    checked = trees.densities(densities, params, name="densities", tree_name="params")
    rows = zip(paths_and_leaves, checked, jax.tree.leaves(selected), strict=True)
    found: list[Kernel | None] = []
    for (path, leaf), density, is_kernel in rows:
        if not is_kernel or leaf.size == 0:
            found.append(None)
            continue
        name = trees.path_name(path)
        view, geometry = read(path, leaf, layout)
        counts = _layer_counts(density, view.stack, geometry.size, name)
        found.append(Kernel(name, view, geometry, counts))
    return found


def read(
    path: Any, leaf: Any, layout: LayoutOf, remedy: str = "Let where= select kernels only."
) -> tuple[fan_axes.View, Geometry]:
    """Read the shape of a kernel: how its axes are read, and the geometry of a layer.

    The matrices along the batch axes of a layer are groups of its geometry.
    """
    name = trees.path_name(path)
    if len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"params[{name}] has dtype {leaf.dtype} and shape {leaf.shape}, outside the floating "
            f"arrays of 2 or more axes. {remedy}"
        )
    found = trees.layout(layout, path, leaf)
    view = trees.view(found, path, leaf)
    return view, _geometry(view, found, name)


def feasible(
    found: list[Kernel | None],
    needs: Any,
    *,
    redistribute: bool,
    what: str = "orthogonal matrices",
) -> list[Kernel | None]:
    """Return the kernels with counts of at least ``needs(geometry)`` a layer, of the same sum.

    ``what`` needs them, for the message.
    """
    present = [kernel for kernel in found if kernel is not None]
    none = np.zeros(0, np.int64)
    count = np.concatenate([none, *(kernel.counts for kernel in present)])
    need = np.concatenate(
        [none, *(np.full_like(kernel.counts, needs(kernel.geometry)) for kernel in present)]
    )
    short = count < need
    if short.any() and not redistribute:
        raise ValueError(_shortage(present, short, need, what))
    room = np.maximum(count - need, 0)
    excess = int((need - count)[short].sum())
    if excess > room.sum():
        size = sum(kernel.geometry.size * len(kernel.counts) for kernel in present)
        raise ValueError(
            f"densities leave {count.sum()} of {size} weights, outside [{need.sum()}, {size}]: "
            f"{what} need more non-zeros in all the layers together. Raise the density "
            f"to at least {need.sum() / size:.6g}."
        )
    if excess:
        given = selection.round_to_total(excess * (room / room.sum()), room, excess)
        count = np.where(short, need, count - given)
    parts = iter(np.split(count, np.cumsum([len(kernel.counts) for kernel in present])))
    return [None if kernel is None else kernel._replace(counts=next(parts)) for kernel in found]


def place(new: Params, mask: Mask, params: Params) -> tuple[Params, Mask]:
    """Give each new kernel and its mask the sharding of its parameter, and copy dense leaves.

    Without a copy, donating a start would take the parameters along that it left as they were.
    """

    def place_leaf(leaf: Any, leaf_mask: Any, param: Any) -> Any:
        if np.ndim(leaf_mask) > 0:
            return shardings.like(leaf, param)
        return leaf.copy() if isinstance(leaf, jax.Array | np.ndarray) else leaf

    new = jax.tree.map(place_leaf, new, trees.boxed_as(mask, params), params)
    # The new kernels have the shardings, also those that only the end of a program demands.
    return new, trees.without_axis_names(place_mask(mask, new))


def place_mask(mask: Mask, params: Params) -> Mask:
    """Give the mask of each kernel the sharding of its parameter."""
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(params), strict=True)
    placed = [shardings.like(leaf, param) if np.ndim(leaf) else leaf for leaf, param in pairs]
    return jax.tree.unflatten(jax.tree.structure(mask), placed)


def _geometry(view: fan_axes.View, layout: Layout, name: str) -> Geometry:
    of_matrix = layout.groups
    checks.feature_groups(
        of_matrix, view.outputs, name=f"layout({name}).groups", outputs_name=f"outputs of {name}"
    )
    outputs, groups = view.outputs // of_matrix, max(view.matrices, 1) * of_matrix
    geometry = Geometry(view.taps, view.inputs, outputs, groups, layout.transposed)
    remedy = "Split the layer."
    high = selection.MAX_SIZE
    checks.integer(geometry.size, low=0, high=high, name=f"params[{name}].size", remedy=remedy)
    return geometry


def _layer_counts(density: Any, stack: tuple[int, ...], size: int, name: str) -> Counts:
    """Return the count of each layer of a stack: a single density is shared evenly among them."""
    if checks.is_traced(density):
        remedy = "Counts are computed on the host: compute the densities outside of jit."
        raise checks.value_error(f"densities[{name}]", density, "is being traced", remedy)
    if np.ndim(density) and np.shape(density) != stack:
        raise ValueError(
            f"densities[{name}] has shape {np.shape(density)}, outside {{(), {stack}}}, the axes "
            "that stack layers. Say with layout= which kernels are stacks."
        )
    layers = math.prod(stack)
    if np.ndim(density):
        return np.asarray(selection.target_count(density, size), np.int64).reshape(layers)
    total = int(selection.target_count(density, layers * size))
    share = np.full(layers, total // layers, np.int64)
    share[: total % layers] += 1
    return share


def _shortage(present: list[Kernel], short: Any, need: Any, what: str) -> str:
    """Say which layers have too small a count."""
    lines = []
    index = 0
    for kernel in present:
        for layer, count in enumerate(kernel.counts):
            if short[index]:
                place = (int(axis) for axis in np.unravel_index(layer, kernel.view.stack))
                where = f"[{', '.join(map(str, place))}]" if kernel.view.stack else ""
                lines.append(
                    f"{kernel.name}{where}: {count} of {kernel.geometry.size} weights, "
                    f"needs {need[index]}"
                )
            index += 1
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    listed = "\n  ".join(lines[:20])
    return (
        f"densities are outside what {what} need in {len(lines)} layers:\n  {listed}"
        f'{more}\nRaise the density, give these layers more, or pass infeasible="redistribute" to '
        "take what they need from the other layers."
    )
