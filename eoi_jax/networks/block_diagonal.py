"""A start of block-diagonal masks with Haar blocks (SAO)."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from eoi_jax import masks
from eoi_jax._internal import checks, drawing, layouts, trees
from eoi_jax.networks.base import SparseInit
from eoi_jax.typing import Array, Densities, LayoutOf, Params, Where

__all__ = ["sparsity_aware_orthogonal"]


def sparsity_aware_orthogonal(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    form: Literal["tanh", "relu"] = "tanh",
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
        params: A pytree of arrays: the shapes and dtypes of the kernels, and all other leaves.
        densities: A number for every square kernel, or a tree of the structure of ``params``;
            the numbers of other kernels are ignored. Static.
        form: ``"tanh"``, or ``"relu"`` for networks of paired units; see
            :func:`eoi_jax.sao.orthogonal`.
        scale: Factor of every kernel.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or grouped.

    Returns:
        The parameters, and a mask of the densities ``degree / n`` of square layers and 1 of others.

    Raises:
        ValueError: If the default ``where`` selects no leaf, if a density is no degree over the
            width that the method can do (the nearest that are: in the message), if it differs
            within a stack, or is traced.

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
    scale = checks.finite_scalar(scale, "scale")
    trees.arrays(params)
    selected = jax.tree.leaves(trees.kernels(params, where))
    checked = trees.densities(densities, params, name="densities", tree_name="params")
    treedef: Any
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    new_params, new_mask = [], []
    rows = zip(paths_and_leaves, selected, checked, strict=True)
    for index, ((path, leaf), is_kernel, density) in enumerate(rows):
        if not is_kernel or leaf.size == 0:
            new_params.append(leaf)
            new_mask.append(jnp.array(True))
            continue
        stack, geometry = layouts.read(path, leaf, layout)
        draw = drawing.sao_layer(geometry, density, form, scale, leaf.dtype, trees.path_name(path))
        keys = jax.random.split(jax.random.fold_in(key, index), math.prod(stack))
        kernel, mask = jax.vmap(draw)(keys)
        new_params.append(kernel.reshape(leaf.shape))
        new_mask.append(mask.reshape(leaf.shape))
    whole_mask = treedef.unflatten(new_mask)
    return SparseInit(drawing.copy_dense(whole_mask, treedef.unflatten(new_params)), whole_mask)
