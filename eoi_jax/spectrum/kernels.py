"""Singular values of the layers of a network, and how far the layers are from orthogonal.

Use it to check kernels without an input. A linear layer is its matrix. A convolution on a periodic
grid is one small matrix for each frequency, given by the Fourier transform of the kernel, so no
matrix of the size of the grid is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks, layouts, names, shardings, spectra, trees
from eoi_jax.typing import Array, LayoutOf, Params, Shape, Where

__all__ = ["conv_singular_values", "kernel_orthogonality_errors", "kernel_singular_values"]


def conv_singular_values(
    kernel: Array, spatial_shape: Shape, *, feature_group_count: int = 1
) -> Array:
    r"""All singular values of a convolution with circular padding and stride 1.

    On a periodic grid the convolution is block-diagonal in the Fourier basis. There is one matrix
    for each frequency :math:`\omega` and each group,

    .. math:: \hat K(\omega) = \sum_t e^{-2 \pi i \sum_a \omega_a t_a / n_a} K_t,

    and the singular values of the whole map are those of all these matrices. Where the grid is
    smaller than the kernel, taps that meet on it add up. A kernel with only one non-zero tap
    has the singular values of that tap at every frequency.

    With SAME padding by zeros the map is different at the border, and so are its singular values.
    Strides are not covered.

    Args:
        kernel: Real array ``(*taps, inputs / feature_group_count, outputs)``, as Flax stores it,
            with one to three spatial axes.
        spatial_shape: Sizes of the grid, one for each spatial axis of the kernel, each at least
            1. They may be smaller than the kernel.
        feature_group_count: Into how many groups the channels are divided.

    Returns:
        An array of shape ``(positions * feature_group_count * min(inputs, outputs of a group),)``,
        descending, in float32 or wider; all NaN if the kernel is not finite.

    Raises:
        ValueError: If the kernel is complex or has other axes, if the spatial shape does not fit
            it, or if the groups do not divide the outputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> average = jnp.array([0.5, 0.5]).reshape(2, 1, 1)  # of two neighbors, on a ring of 4
        >>> [f"{value:.3f}" for value in spectrum.conv_singular_values(average, (4,))]
        ['1.000', '0.707', '0.707', '0.000']

    Reference:
        Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019.
    """
    kernel = checks.array(kernel, "kernel")
    if not 3 <= kernel.ndim <= 5:
        raise ValueError(
            f"kernel.shape={kernel.shape} is outside (*taps, inputs, outputs) with 1 to 3 axes of "
            "taps. Reshape the kernel, or use jax.vmap over a stack of them."
        )
    groups = checks.integer(feature_group_count, low=1, name="feature_group_count")
    checks.feature_groups(groups, kernel.shape[-1], outputs_name="kernel.shape[-1]")
    grid = _grid(spatial_shape, kernel.ndim - 2, name="spatial_shape")
    return _values(checks.real_array(kernel, "kernel"), grid=grid, groups=groups)


def kernel_singular_values(
    params: Params,
    *,
    where: Where = trees.is_kernel,
    layout: LayoutOf | None = None,
    spatial_shape: Shape | Callable[[tuple[Any, ...], Any], Shape | None] | None = None,
) -> dict[str, Array]:
    """Singular values of every kernel of a parameter tree, by the name of the kernel.

    A kernel of two axes is the matrix of a linear layer. A kernel of more axes is a circular
    convolution of stride 1, whose singular values depend on the grid
    (:func:`conv_singular_values`), with one exception: if at most one tap of a layer is not zero,
    as in delta-orthogonal starts and in all convolutions of one tap, then every grid only repeats
    the values of that tap. Without a spatial shape these are returned once. For other convolutions
    the spatial shape is required.

    The result is a flat dict, not a tree, since most leaves have no spectrum. Its keys can be used
    in tables and logs.

    Args:
        params: A pytree of arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or have groups;
            required where the shape alone may mean several things, as one of three axes does.
        spatial_shape: The grid of the convolutions: one tuple for all of them, or a function
            ``(path, leaf) -> tuple``, which is called for each kernel with taps and may return
            None for those with only one non-zero tap.

    Returns:
        A dict from the path of each kernel, such as ``"block/conv/kernel"``, to an array of shape
        ``(*stack, k)``, descending along the last axis, in float32 or wider. ``k`` counts
        ``min(inputs, outputs)`` of a group for each group, times the positions of the grid if one
        was given. A layer that is not finite has NaN for all of its values.

    Raises:
        ValueError: If a convolution with several taps has no spatial shape, or a shape that does
            not fit; if its taps are traced, so that zeros cannot be found; if a layout is missing
            or does not fit its leaf; if ``where`` selects no leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import spectrum
        >>> params = {"a": {"kernel": jnp.diag(jnp.array([1.0, 3.0])), "bias": jnp.zeros(2)}}
        >>> spectrum.kernel_singular_values(params)
        {'a/kernel': Array([3., 1.], dtype=float32)}

    Reference:
        Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019.
    """
    layout_of = names.known(layout, params)
    return _by_name(
        lambda path, leaf: _stack_values(path, leaf, layout_of, spatial_shape), params, where
    )


def kernel_orthogonality_errors(
    params: Params, *, where: Where = trees.is_kernel, layout: LayoutOf | None = None
) -> dict[str, Array]:
    r"""Distance from orthogonality of every kernel of a parameter tree, by the name of the kernel.

    A kernel of two axes is the matrix :math:`W` of a linear layer, and its error is
    :math:`\max_{ij} |W W^\top - I|_{ij}`, with :math:`W^\top W` for more rows than columns. A
    kernel of more axes is a circular convolution of stride 1 with the taps :math:`K_t`. On a grid
    of at least :math:`2 k - 1` positions along an axis of :math:`k` taps it
    is an orthogonal map (with orthonormal rows or columns) if and only if

    .. math:: \max_{s, ij} \left| \left( \textstyle\sum_t K_t^{} K_{t + s}^\top
              - \delta_{s 0} I \right)_{ij} \right| = 0,

    with :math:`K_t^\top K_{t + s}^{}` where a group has more inputs than outputs. This maximum is
    the error of the kernel. No grid has to be given. For a kernel with only one non-zero tap it is
    the error of that tap.

    Args:
        params: A pytree of real arrays.
        where: ``(path, leaf) -> bool``, which leaves are kernels.
        layout: ``(path, leaf) -> Layout``, which kernels are stacks of layers or have groups;
            required where the shape alone may mean several things, as one of three axes does.

    Returns:
        A dict from the path of each kernel, such as ``"block/conv/kernel"``, to an array of the
        shape of its stack of layers, ``()`` for a single one, in float32 or wider: the largest
        error of all groups, 0 for an empty kernel.

    Raises:
        ValueError: If a layout is missing or does not fit its leaf; if ``where`` selects no leaf.

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
    layout_of = names.known(layout, params)
    return _by_name(lambda path, leaf: _stack_errors(path, leaf, layout_of), params, where)


def _by_name(
    measure: Callable[[Any, Any], Array], params: Params, where: Where
) -> dict[str, Array]:
    """Map ``measure(path, leaf)`` over the kernels of a tree."""
    selected = jax.tree.leaves(trees.kernels(params, where, name_others=False))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        trees.path_name(path): measure(path, shardings.unsharded(leaf))
        for (path, leaf), is_kernel in zip(leaves, selected, strict=True)
        if is_kernel
    }


def _stack_values(path: Any, leaf: Any, layout: LayoutOf, spatial_shape: Any) -> Array:
    """Singular values of each layer of one kernel."""
    name = trees.path_name(path)
    view, geometry = layouts.read(path, leaf, layout)
    layers = view.layers(checks.real_array(leaf, f"params[{name}]"))
    grid: tuple[int, ...] = ()
    if geometry.taps:
        given = spatial_shape(path, leaf) if callable(spatial_shape) else spatial_shape
        if given is None:
            layers = _only_tap(layers, name)
        else:
            grid = _grid(given, len(geometry.taps), name=f"spatial_shape for {name}")
    found = _all_values(layers, grid=grid, groups=geometry.groups)
    return found.reshape(*view.stack, *found.shape[1:])


# Compiled once for all kernels of a shape.
@partial(jax.jit, static_argnames=("grid", "groups"))
def _all_values(layers: Array, *, grid: tuple[int, ...], groups: int) -> Array:
    values = partial(_values, grid=grid, groups=groups)
    # A grid multiplies the memory of a layer by its size: those go one after the other.
    return jax.lax.map(values, layers) if grid else jax.vmap(values)(layers)


@partial(jax.jit, static_argnames=("grid", "groups"))
def _values(kernel: Array, *, grid: tuple[int, ...], groups: int) -> Array:
    """Singular values of one layer, descending; without a grid those of a linear layer."""
    return spectra.where_finite(partial(_finite_values, grid=grid, groups=groups), kernel)


def _finite_values(kernel: Array, *, grid: tuple[int, ...], groups: int) -> Array:
    for axis, size in enumerate(grid):
        kernel = _wrap(kernel, axis, size)
    channels = kernel.shape[-1] // groups
    matrices = jnp.moveaxis(kernel.reshape(*kernel.shape[:-1], groups, channels), -2, 0)
    if 0 in matrices.shape[-2:]:
        return jnp.zeros(0, kernel.dtype)
    if not grid:
        values = jnp.linalg.svd(matrices, compute_uv=False).ravel()
    else:
        half = jnp.fft.rfftn(matrices, axes=range(1, len(grid) + 1))
        values = jnp.linalg.svd(half, compute_uv=False)
        # The matrices at opposite frequencies are conjugate, and the transform left out one of
        # each pair; along the last axis only 0 and an even grid's middle are their own opposites.
        paired = values[..., 1 : (grid[-1] + 1) // 2, :]
        values = jnp.concatenate([values.ravel(), paired.ravel()])
    return jnp.sort(values, descending=True)


def _wrap(kernel: Array, axis: int, size: int) -> Array:
    """Lay the taps of one axis around a ring of ``size`` positions."""
    shape = kernel.shape
    turns = -(-shape[axis] // size)
    padding = [(0, 0)] * kernel.ndim
    padding[axis] = (0, turns * size - shape[axis])
    rings = jnp.pad(kernel, padding).reshape(*shape[:axis], turns, size, *shape[axis + 1 :])
    return jnp.sum(rings, axis=axis)


def _only_tap(layers: Array, name: str) -> Array:
    """Return the one tap of each layer that is not zero."""
    taps = layers.reshape(len(layers), math.prod(layers.shape[1:-2]), *layers.shape[-2:])
    if taps.shape[1] == 1:
        return taps[:, 0]
    remedy = "Give its grid: spatial_shape=(32, 32), or spatial_shape=lambda path, leaf: ...."
    if checks.is_traced(taps):
        raise ValueError(
            f"params[{name}] is being traced, so it is not known which of its {taps.shape[1]} taps "
            f"are zero, and with several non-zero taps the spectrum depends on the grid. {remedy}"
        )
    used = np.count_nonzero(np.any(np.asarray(taps), axis=(2, 3)), axis=1).max(initial=0)
    if used > 1:
        raise ValueError(
            f"params[{name}] has {used} taps that are not zero, outside [0, 1]: the spectrum of "
            f"such a convolution depends on the grid. {remedy}"
        )
    return jnp.sum(taps, axis=1)


def _grid(value: Sequence[int], axes: int, *, name: str) -> tuple[int, ...]:
    """Accept one size for each axis."""
    try:
        sizes = tuple(value)
    except TypeError:
        raise checks.value_error(
            name, value, "is not a sequence of ints", "Give static sizes such as (32, 32)."
        ) from None
    if len(sizes) != axes:
        raise checks.value_error(
            name,
            sizes,
            f"has {len(sizes)} axes instead of {axes}",
            "Give one size for each spatial axis of the kernel.",
        )
    return tuple(checks.integer(size, low=1, name=name) for size in sizes)


def _stack_errors(path: Any, leaf: Any, layout: LayoutOf) -> Array:
    """Return the error of each layer of one kernel."""
    view, geometry = layouts.read(path, leaf, layout)
    layers = view.layers(checks.real_array(leaf, f"params[{trees.path_name(path)}]"))
    return _errors(layers, groups=geometry.groups).reshape(view.stack)


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
