"""A start of block-diagonal masks with Haar blocks (SAO)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax import initializers, masks, sao
from eoi_jax._internal import block_diagonal, checks, fan_axes, layouts, names, shardings, trees
from eoi_jax._internal.arrays import nonzero
from eoi_jax._internal.conv import at_center
from eoi_jax._internal.keys import threefry_key
from eoi_jax.networks.base import SparseInit
from eoi_jax.typing import Array, Densities, Initializer, LayoutOf, Params, Where

__all__ = ["sparsity_aware_orthogonal"]

_DrawLayer: TypeAlias = Callable[[Array], tuple[Array, Array]]  # key -> (kernel, mask)


def sparsity_aware_orthogonal(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    activation: Literal["tanh", "relu"] = "tanh",
    scale: float | Array = 1.0,
    where: Where = masks.is_kernel,
    layout: LayoutOf | None = None,
) -> SparseInit:
    r"""Draw block-diagonal masks of Haar blocks with permuted channels (SAO).

    Every unit of a square layer of width :math:`n` has the same number of connections
    :math:`\text{degree} = d n`. A linear layer is :func:`eoi_jax.sao.orthogonal`; a convolution
    has such a matrix at its center tap, and all taps of its connected channels are unmasked. The
    method does not define layers that are not square, or grouped: they are dense, orthogonal at
    the start and counted in the mask.

    Args:
        key: A random key.
        params: A pytree of arrays: the shapes and dtypes of the kernels, for which a
            :class:`jax.ShapeDtypeStruct` is enough, and all other leaves.
        densities: A number for every square kernel, or a tree of the structure of ``params``;
            the numbers of other kernels are ignored. Static.
        activation: ``"tanh"``, or ``"relu"`` for networks of paired units; see
            :func:`eoi_jax.sao.orthogonal`.
        scale: Factor of every kernel.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped.

    Returns:
        The parameters, and a mask of the densities ``degree / n`` of square layers and 1 of others.

    Raises:
        ValueError: If ``where`` selects no leaf, if a density is not a possible degree divided by
            the width (the message names the nearest possible densities), if it differs within a
            stack, or is traced.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> params = {"kernel": jnp.zeros((64, 64)), "bias": jnp.zeros(64)}
        >>> start = eoi.sparsity_aware_orthogonal(jax.random.key(0), params, 0.125)
        >>> int(start.mask["kernel"].sum(axis=0).min()), int(start.mask["kernel"].sum(axis=0).max())
        (8, 8)

    Reference:
        Esguerra et al., "Sparsity-Aware Orthogonal Initialization of Deep Neural Networks", IEEE
        Access 2023.
    """
    key = threefry_key(key)
    scale = checks.number(scale, "scale")
    activation = block_diagonal.check_activation(activation)
    selected = trees.kernels(params, where)
    params = trees.arrays(params, shapes_of=selected)
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    is_kernel = jax.tree.leaves(selected)
    layout = names.known(layout, params)
    checked = trees.densities(densities, params, name="densities", tree_name="params")
    new_params, new_mask = [], []
    for index, (path, leaf) in enumerate(paths_and_leaves):
        if not is_kernel[index] or leaf.size == 0:
            new_params.append(leaf)
            new_mask.append(jnp.array(True))
            continue
        view, geometry = layouts.read(path, leaf, layout)
        # Each matrix along the batch axes of a layer is a layer to the method.
        geometry = geometry._replace(groups=geometry.groups // view.matrices)
        name = f"densities[{trees.path_name(path)}]"
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        checks.scale(scale, dtype)
        if geometry.inputs != geometry.outputs or geometry.groups > 1:
            draw = _dense_layer(geometry, scale, dtype)
        else:
            degree = _degree(geometry.inputs, checked[index], activation, name)
            draw = _sparse_layer(geometry, degree, activation, scale, dtype)
        draw_leaf = functools.partial(_leaf, draw, view)
        out = [shardings.asked(leaf)] * 2
        kernel, mask = shardings.drawn(draw_leaf, jax.random.fold_in(key, index), out)
        new_params.append(kernel)
        new_mask.append(mask)
    mask_tree = treedef.unflatten(new_mask)
    return SparseInit(*layouts.place(treedef.unflatten(new_params), mask_tree, params))


def _leaf(draw: _DrawLayer, view: fan_axes.View, key: Array) -> list[Array]:
    """Draw the matrices of a leaf, and its mask."""
    keys = jax.random.split(key, math.prod(view.stack) * view.matrices)
    kernels, masks = jax.vmap(draw)(keys)
    return [view.from_matrices(kernels), view.from_matrices(masks)]


def _dense_layer(geometry: layouts.Geometry, scale: Any, dtype: Any) -> _DrawLayer:
    """Draw a layer that the method leaves dense: an orthogonal kernel, and a mask of all of it."""
    init: Initializer = jax.nn.initializers.orthogonal(scale)
    shape, fused = geometry.shape, 1
    if geometry.taps:
        init = initializers.delta_orthogonal(
            scale=scale, feature_group_count=geometry.groups, transposed=geometry.transposed
        )
    else:
        shape, fused = (geometry.inputs, geometry.outputs), geometry.groups
    everything = jnp.ones(geometry.shape, bool)
    compute_dtype = checks.compute_dtype(dtype)

    def one(key: Array) -> Array:
        return init(key, shape, compute_dtype)

    draw = one if fused == 1 else fan_axes.side_by_side(one, fused)
    return lambda key: (draw(key).astype(dtype), everything)


def _sparse_layer(
    geometry: layouts.Geometry, degree: int, activation: Any, scale: Any, dtype: Any
) -> _DrawLayer:
    """Draw a square layer; all taps of a convolution's connected channels are unmasked."""

    def draw(key: Array) -> tuple[Array, Array]:
        matrix = sao.orthogonal(
            key,
            geometry.inputs,
            degree,
            activation=activation,
            scale=scale,
            dtype=checks.compute_dtype(dtype),
        )
        tap = matrix.astype(dtype)
        kernel = at_center(tap, geometry.shape, transposed=geometry.transposed)
        return kernel, jnp.broadcast_to(nonzero(matrix), geometry.shape)

    return draw


def _degree(size: int, density: Any, activation: Any, name: str) -> int:
    """Return the degree of all layers of a stack."""
    if np.ndim(density) and not checks.is_traced(density):
        if np.unique(density).size > 1:
            raise ValueError(
                f"{name} differ within the stack, outside one density for all its layers. The "
                "degree is a shape: give one number."
            )
        density = np.unique(density)[0]
    try:
        return sao.degree(size, density, activation=activation)
    except ValueError as error:
        raise ValueError(f"{name} does not suit the method: {error}") from None
