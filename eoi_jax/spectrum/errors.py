"""How far the kernels of a network are from orthogonal, layer by layer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax import masks
from eoi_jax._internal import checks, layouts, trees
from eoi_jax.typing import Array, LayoutOf, Params, Where

__all__ = ["errors_of", "kernel_orthogonality_errors"]


def kernel_orthogonality_errors(
    params: Params, *, where: Where = masks.is_kernel, layout: LayoutOf | None = None
) -> dict[str, Array]:
    r"""Largest entry by which each kernel of a parameter tree misses orthogonality, by its name.

    A kernel of two axes is the matrix of a linear layer, and its error is that of
    :func:`orthogonality_error`. One of more is a circular convolution of stride 1 with the taps
    :math:`K_t`. On a grid of at least :math:`2 k - 1` positions along an axis of :math:`k` taps it
    is an orthogonal map, one with orthonormal rows or columns, if and only if

    .. math:: \max_{s, ij} \left| \left( \textstyle\sum_t K_t^{} K_{t + s}^\top
              - \delta_{s 0} I \right)_{ij} \right| = 0,

    with :math:`K_t^\top K_{t + s}^{}` where a group has more inputs than outputs. No grid has to be
    given. Of a kernel with one tap that is not zero this is the error of that tap.

    Args:
        params: a pytree of real arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or have groups;
            required where the shape alone may mean several things, as one of three axes does.

    Returns:
        A dict from the path of each kernel, such as ``"block/conv/kernel"``, to an array of the
        shape of its stack of layers, ``()`` for a single one, in float32 or wider: the largest
        error of all groups, 0 for an empty kernel.

    Raises:
        ValueError: if a layout is missing or does not fit its leaf; if the default ``where``
            selects no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> average = jnp.array([0.5, 0.5]).reshape(2, 1, 1)  # of two neighbors on a ring
        >>> spectrum.kernel_orthogonality_errors({"kernel": average[None]})
        {'kernel': Array(0.5, dtype=float32)}

    Reference:
        Wang et al., "Orthogonal Convolutional Neural Networks", CVPR 2020, whose penalty is the
        sum of squares of these entries.
    """
    selected = trees.kernels(params, where)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        trees.path_name(path): errors_of(path, leaf, layout)
        for (path, leaf), is_kernel in zip(leaves, jax.tree.leaves(selected), strict=True)
        if is_kernel
    }


def errors_of(path: Any, leaf: Any, layout: LayoutOf | None) -> Array:
    """Return the error of each layer of one kernel."""
    stack, geometry = layouts.read(path, leaf, layout)
    layers = jnp.asarray(leaf).reshape(math.prod(stack), *geometry.shape)
    layers = layers.astype(checks.compute_dtype(layers.dtype))
    return _errors(layers, groups=geometry.groups).reshape(stack)


@partial(jax.jit, static_argnames="groups")
def _errors(layers: Array, *, groups: int) -> Array:
    return jax.lax.map(partial(_error, groups=groups), layers)


def _error(kernel: Array, *, groups: int) -> Array:
    """Error of one layer, ``(*taps, inputs, outputs)``."""
    *taps, inputs, outputs = kernel.shape
    if kernel.size == 0:
        return jnp.zeros((), kernel.dtype)
    matrices = jnp.moveaxis(kernel.reshape(*taps, inputs, groups, outputs // groups), -2, 0)
    if matrices.shape[-2] > matrices.shape[-1]:
        matrices = jnp.swapaxes(matrices, -1, -2)
    # One position more than the lags between two taps: products never wrap around.
    axes = tuple(range(1, len(taps) + 1))
    if taps:
        matrices = jnp.fft.fftn(matrices, s=[2 * size - 1 for size in taps], axes=axes)
    adjoint = jnp.swapaxes(matrices.conj(), -1, -2)
    gram = jnp.matmul(matrices, adjoint, precision=jax.lax.Precision.HIGHEST)
    if taps:
        gram = jnp.fft.ifftn(gram, axes=axes).real
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    gram = gram.at[(slice(None), *(0,) * len(taps))].add(-identity)
    return jnp.max(jnp.abs(gram))
