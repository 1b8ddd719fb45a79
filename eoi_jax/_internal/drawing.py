"""Drawing the layers of a network: kernel and mask of one geometry."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import sao, sparse_orthogonal
from eoi_jax._internal import checks, selection
from eoi_jax._internal.haar import delta_orthogonal
from eoi_jax._internal.layouts import Counts, Geometry, Kernel
from eoi_jax._internal.vmap import map_on_cpu
from eoi_jax.givens import AngleLaw
from eoi_jax.typing import Array, Layout, Mask, Params

__all__ = ["blocks", "copy_dense", "exact", "map_kernels", "sao_layer"]


# Smaller matrices are drawn in this shape: padding costs them microseconds, and a program a second.
_SMALL = 64


class _Request(NamedTuple):
    """The matrices of the layers of one geometry: their keys, and the non-zeros of each."""

    keys: Array
    counts: Counts
    geometry: Geometry
    dtype: Any


def exact(
    key: Array,
    leaves: Sequence[Any],
    kernels: Sequence[Kernel | None],
    budgets: Sequence[Any],
    *,
    scale: Any,
    center_density: float | Literal["density"] | None,
    all_taps: bool,
    angles: AngleLaw,
    permute: bool,
) -> tuple[list[Any], list[Any]]:
    """Draw all kernels of a tree and their masks; other leaves stay as they are."""
    angles = sparse_orthogonal.check_angles(angles)
    # Layers of one geometry are placed together: one program each is compiled.
    alike: dict[tuple[Geometry, Any], list[int]] = {}
    for index, kernel in enumerate(kernels):
        if kernel is not None:
            wide = checks.compute_dtype(jax.dtypes.canonicalize_dtype(leaves[index].dtype))
            alike.setdefault((kernel.geometry, wide), []).append(index)
            _check_center(kernel, center_density, all_taps)
    requests, rest = [], []
    for (geometry, wide), indices in alike.items():
        budget = np.concatenate([budgets[index] for index in indices])
        keys = [jax.random.split(jax.random.fold_in(key, i), len(budgets[i])) for i in indices]
        centers = _center_counts(geometry, budget, center_density, all_taps)
        for_matrices, for_masks = _keys(jnp.concatenate(keys), geometry.groups)
        requests.append(_Request(for_matrices, np.repeat(centers, geometry.groups), geometry, wide))
        rest.append((for_masks, budget))
    drawn = _draw(requests, angles)
    new_leaves, new_masks = list(leaves), [jnp.array(True) for _ in leaves]
    for request, matrices, own, indices in zip(requests, drawn, rest, alike.values(), strict=True):
        for_masks, budget = own
        placed = _place(
            request.keys,
            matrices,
            for_masks,
            jnp.asarray(budget, jnp.int32),
            scale,
            geometry=request.geometry,
            shapes=tuple(leaves[index].shape for index in indices),
            permute=permute,
            all_taps=all_taps,
        )
        for index, values, mask in zip(indices, *placed, strict=True):
            dtype = jax.dtypes.canonicalize_dtype(leaves[index].dtype)
            new_leaves[index], new_masks[index] = values.astype(dtype), mask
    return new_leaves, new_masks


def blocks(leaf: Array, layout: Layout) -> tuple[Array, Callable[[Array], Array]]:
    """Put the matrices of a kernel in one stack ``(matrices, rows, columns)``, and undo it."""
    axes, groups = layout.batch_axes, layout.groups
    layers, outputs = math.prod(leaf.shape[:axes]), leaf.shape[-1]
    grouped = jnp.reshape(leaf, (layers, -1, groups, outputs // groups))
    stacked = jnp.moveaxis(grouped, 2, 1).reshape(layers * groups, -1, outputs // groups)

    def back(blocks: Array) -> Array:
        split = blocks.reshape(layers, groups, -1, outputs // groups)
        return jnp.moveaxis(split, 1, 2).reshape(leaf.shape)

    return stacked, back


def _check_center(kernel: Kernel, center_density: Any, all_taps: bool) -> None:
    """Refuse a center density that no orthogonal matrix of a convolution can have."""
    if not isinstance(center_density, float) or kernel.geometry.num_taps == 1 or all_taps:
        return
    minimum = 1 / max(kernel.geometry.inputs, kernel.geometry.outputs)
    remedy = f"An orthogonal matrix at the center of {kernel.name} has no fewer non-zeros."
    checks.density(center_density, name="center_density", minimum=minimum, why=remedy)


def _center_counts(
    geometry: Geometry, budget: Counts, center_density: Any, all_taps: bool
) -> Counts:
    """Count the non-zeros that each matrix at the center tap of each layer may have."""
    size = geometry.inputs * geometry.outputs
    counts = budget // (geometry.groups * (geometry.num_taps if all_taps else 1))
    if geometry.num_taps > 1 and not all_taps:
        density = budget / geometry.size
        if center_density is None:
            rule = np.minimum(np.minimum(density * geometry.num_taps, np.sqrt(density)), 1.0)
        else:
            rule = density if center_density == "density" else np.full_like(density, center_density)
        counts = np.minimum(counts, np.floor(rule * size + 0.5).astype(np.int64))
    return np.clip(counts, geometry.minimum // geometry.groups, size)


@functools.partial(jax.jit, static_argnames="groups")
def _keys(keys: Array, groups: int) -> tuple[Array, Array]:
    """Split the key of each layer into one for each of its matrices, and one for its mask."""
    for_weights, for_masks = jax.vmap(jax.random.split, out_axes=1)(keys)
    for_matrices = jax.vmap(lambda key: jax.random.split(key, groups))(for_weights)
    return for_matrices.reshape(-1, *for_matrices.shape[2:]), for_masks


def _draw(requests: Sequence[_Request], angles: AngleLaw) -> list[Array]:
    """Draw the matrices ``(number, size, columns)``, tall or square, of each request.

    Small ones of whatever shape are drawn by one program.
    """
    together: dict[Any, list[int]] = {}
    for index, (_, _, geometry, dtype) in enumerate(requests):
        together.setdefault((_padded(*geometry.tall), dtype), []).append(index)
    drawn: dict[int, Array] = {}
    for (padded, dtype), indices in together.items():
        own = [requests[index] for index in indices]
        lengths = [len(request.counts) for request in own]
        shapes = np.repeat([request.geometry.tall for request in own], lengths, axis=0)
        arguments = (np.concatenate([request.counts for request in own]), *shapes.T)
        keys = jnp.concatenate([request.keys for request in own])
        if padded == (_SMALL, _SMALL):
            # A power of two of them, so that networks share programs; those of 1 x 1 cost nothing.
            more = (1 << (len(keys) - 1).bit_length()) - len(keys)
            keys = keys[np.minimum(np.arange(len(keys) + more), len(keys) - 1)]
            arguments = tuple(np.pad(own, (0, more), constant_values=1) for own in arguments)
        matrices = sparse_orthogonal.draw_padded(
            keys,
            *(jnp.asarray(own, jnp.int32) for own in arguments),
            padded=padded,
            dtype=dtype,
            angles=angles,
        )
        ends = np.cumsum(lengths)
        for index, end, length in zip(indices, ends, lengths, strict=True):
            size, columns = requests[index].geometry.tall
            start, stop = (int(end - length), 0, 0), (int(end), size, columns)
            drawn[index] = jax.lax.slice(matrices, start, stop)
    return [drawn[index] for index in range(len(requests))]


def _padded(size: int, columns: int) -> tuple[int, int]:
    """Choose the shape of the program that draws a matrix."""
    return (_SMALL, _SMALL) if 1 < size <= _SMALL else (size, columns)


@functools.partial(jax.jit, static_argnames=("geometry", "shapes", "permute", "all_taps"))
def _place(
    keys: Array,
    matrices: Array,
    for_masks: Array,
    budgets: Array,
    scale: Any,
    *,
    geometry: Geometry,
    shapes: tuple[tuple[int, ...], ...],
    permute: bool,
    all_taps: bool,
) -> tuple[list[Array], list[Array]]:
    """Make the leaves and masks of layers of one geometry from their matrices."""
    taps, inputs, outputs, groups, _ = geometry
    layers = len(budgets)
    if permute:
        permuted = map_on_cpu(sparse_orthogonal.permuted)
        matrices = jax.vmap(permuted)(keys, matrices)
    if inputs < outputs:
        matrices = matrices.swapaxes(1, 2)
    matrices = matrices * jnp.asarray(scale, matrices.dtype)
    matrices = matrices.reshape(layers, groups, inputs, outputs)
    tap = jnp.moveaxis(matrices, 1, 2).reshape(layers, inputs, groups * outputs)
    kernels = jnp.zeros((layers, *geometry.shape), tap.dtype).at[:, *geometry.center].set(tap)
    # The support of what is drawn: a cast to fewer bits may round entries to zero.
    spread = tap.reshape(layers, *(1 for _ in taps), inputs, groups * outputs)
    support = jnp.broadcast_to(spread != 0, kernels.shape) if all_taps else kernels != 0
    masks = selection.unmask_rows(for_masks, support.reshape(layers, -1), budgets)
    ends = np.cumsum([math.prod(shape) // geometry.size for shape in shapes])[:-1]

    def leaves(whole: Array) -> list[Array]:
        parts = zip(jnp.split(whole, ends), shapes, strict=True)
        return [part.reshape(shape) for part, shape in parts]

    return leaves(kernels), leaves(masks)


def sao_layer(
    geometry: Geometry,
    density: Any,
    form: Literal["tanh", "relu"],
    scale: Any,
    dtype: Any,
    name: str,
) -> Callable[[Array], tuple[Array, Array]]:
    """Return ``key -> (kernel, mask)`` of one layer."""
    taps, inputs, outputs, groups, transposed = geometry
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    wide = checks.compute_dtype(dtype)
    everything = jnp.ones(geometry.shape, bool)
    if inputs != outputs or groups > 1:
        init = (
            delta_orthogonal(scale=scale, feature_group_count=groups, transposed=transposed)
            if taps
            else jax.nn.initializers.orthogonal(scale)
        )
        return lambda key: (init(key, geometry.shape, wide).astype(dtype), everything)
    if np.ndim(density) and not checks.is_traced(density):
        if np.unique(density).size > 1:
            raise ValueError(
                f"densities[{name}] differ within the stack, outside one density for all its "
                "layers. The degree is a shape: give one number."
            )
        density = np.unique(density)[0]
    try:
        degree = sao.degree(inputs, density, form=form)
    except ValueError as error:
        raise ValueError(f"densities[{name}] does not suit the method: {error}") from None

    def draw(key: Array) -> tuple[Array, Array]:
        matrix = sao.orthogonal(key, inputs, degree, form=form, scale=scale, dtype=wide)
        kernel = jnp.zeros(geometry.shape, dtype).at[geometry.center].set(matrix.astype(dtype))
        return kernel, jnp.broadcast_to(matrix != 0, geometry.shape)

    return draw


def copy_dense(mask: Mask, params: Params) -> Params:
    """Copy the leaves that stay as they were: donating a start must not take the others along."""
    return jax.tree.map(
        lambda m, leaf: leaf.copy() if np.ndim(m) == 0 and isinstance(leaf, jax.Array) else leaf,
        mask,
        params,
    )


def map_kernels(draw: Callable[[int, Any, Any], Any], params: Params, selected: Any) -> Params:
    """Map ``draw(leaf index, path, leaf)`` over the kernels of a tree."""
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    rows = enumerate(zip(paths_and_leaves, jax.tree.leaves(selected), strict=True))
    return treedef.unflatten(
        [
            draw(index, path, leaf) if is_kernel and leaf.size else leaf
            for index, ((path, leaf), is_kernel) in rows
        ]
    )
