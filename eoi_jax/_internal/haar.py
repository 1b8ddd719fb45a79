"""Dense orthogonal kernels: Haar matrices, and the convolutions that are built of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax.typing import Array, DType, Initializer, Shape

__all__ = ["at_center", "conv_orthogonal", "delta_orthogonal", "haar"]

Draw: TypeAlias = Callable[[Array, tuple[int, ...], Any], Array]


def delta_orthogonal(
    *,
    scale: float | Array = 1.0,
    feature_group_count: int = 1,
    transposed: bool = False,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Dense delta-orthogonal kernels: a Haar orthogonal matrix at the center tap.

    .. math:: W_{p,:,:} = \delta_{p,c}\, \text{scale} \cdot H

    where :math:`H`, of shape ``(inputs, outputs)``, is uniform among the matrices with orthonormal
    rows or columns, whichever are fewer. The layer multiplies every pixel by :math:`H`. Where
    output and input grids align (circular or SAME padding, stride 1) it therefore keeps norms
    exactly, times ``scale``, if no group has more inputs than outputs; with more inputs it is a
    co-isometry: of its singular values, ``outputs / inputs`` are ``scale`` and the rest 0.

    This is :func:`eoi_jax.initializers.conv` at density 1 with a uniform instead of a sparse
    matrix. :func:`jax.nn.initializers.delta_orthogonal` draws the same law, but neither groups,
    other than three to five axes, nor more inputs than outputs.

    Args:
        scale: factor of the kernel; may be traced.
        feature_group_count: groups of channels, as in :class:`flax.linen.Conv`; every group has a
            matrix of its own.
        transposed: whether the kernel is for a transposed convolution
            (:class:`flax.linen.ConvTranspose` with its default ``transpose_kernel=False``): the
            aligned tap of an even size ``k`` is then ``k // 2`` and not ``(k - 1) // 2``.
        dtype: the dtype if ``init`` is called without one. float16 and bfloat16 are computed in
            float32 and cast last.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, inputs / groups, outputs)``.

    Raises:
        ValueError: here for a bad ``scale``, ``feature_group_count`` or ``dtype``; from ``init``
            for a shape with fewer than three axes or outputs that the groups do not divide.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> init = eoi.initializers.delta_orthogonal()
        >>> layer = nn.Conv(64, (3, 3), padding="CIRCULAR", kernel_init=init)
        >>> x = jax.random.normal(jax.random.key(1), (1, 8, 8, 32))
        >>> y, _ = layer.init_with_output(jax.random.key(0), x)
        >>> bool(jnp.allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5))
        True

    Reference:
        Xiao et al., *Dynamical Isometry and a Mean Field Theory of CNNs* (ICML 2018), Algorithm 2.
    """
    draw = _transposed_delta_kernel if transposed else _delta_kernel
    return _initializer(draw, scale, feature_group_count, dtype)


def conv_orthogonal(
    *,
    scale: float | Array = 1.0,
    feature_group_count: int = 1,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Dense orthogonal kernels that use every tap of a convolution.

    The kernel is a Haar orthogonal matrix followed by one convolution of two taps,
    :math:`P` and :math:`I - P`, for each step of each axis. As a function of the frequency
    :math:`\omega` along the spatial axes :math:`a` of sizes :math:`k_a`,

    .. math:: \hat W(\omega) = \text{scale} \cdot H \prod_{t=1}^{\max_a k_a - 1} \;
              \prod_{a:\, t < k_a} \bigl(P_{t,a} + (I - P_{t,a}) e^{-i\omega_a}\bigr)

    with independent symmetric projections :math:`P_{t,a}` onto uniform subspaces, each of a rank
    drawn from a binomial law (a fair coin for each dimension). Every factor is unitary, so the
    circular convolution is exactly orthogonal, on a grid of any size, for kernels of any size: all
    its singular values are ``scale``. With more inputs than outputs the kernel is the transpose of
    one with the numbers swapped, a co-isometry: of its singular values, ``outputs / inputs`` are
    ``scale`` and the rest 0.

    Of the squared norm, tap :math:`p` has in the mean the fraction
    :math:`\prod_a \binom{k_a - 1}{p_a} 2^{1 - k_a}`. Norms are kept under circular padding and
    stride 1 only: SAME and VALID padding cut off what crosses the border.

    Args:
        scale: factor of the kernel; may be traced.
        feature_group_count: groups of channels, as in :class:`flax.linen.Conv`; every group has a
            kernel of its own.
        dtype: the dtype if ``init`` is called without one. float16 and bfloat16 are computed in
            float32 and cast last.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, inputs / groups, outputs)``, of :class:`flax.linen.Conv` and
        :class:`flax.linen.ConvTranspose` alike.

    Raises:
        ValueError: here for a bad ``scale``, ``feature_group_count`` or ``dtype``; from ``init``
            for a shape with fewer than three axes or outputs that the groups do not divide.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> init = eoi.initializers.conv_orthogonal()
        >>> layer = nn.Conv(64, (3, 3), padding="CIRCULAR", kernel_init=init)
        >>> x = jax.random.normal(jax.random.key(1), (1, 8, 8, 32))
        >>> y, _ = layer.init_with_output(jax.random.key(0), x)
        >>> bool(jnp.allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5))
        True

    Reference:
        Xiao et al., *Dynamical Isometry and a Mean Field Theory of CNNs* (ICML 2018), Algorithm 1,
        here for any number of spatial axes, also of different sizes.
    """
    return _initializer(_conv_kernel, scale, feature_group_count, dtype)


def haar(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw matrices ``(..., n, m)`` uniform among those with orthonormal rows or columns."""
    *batch, rows, columns = shape
    tall = (*batch, max(rows, columns), min(rows, columns))
    q, r = jnp.linalg.qr(jax.random.normal(key, tall, dtype))
    # The signs that QR chooses are not random; a positive diagonal of R makes Q uniform. A zero
    # on it, which a 1 x 1 matrix meets once in ten million draws, must not become a zero of Q.
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(dtype)
    q = q * signs[..., None, :]
    return q if rows >= columns else jnp.swapaxes(q, -2, -1)


def at_center(tap: Array, shape: Shape, *, transposed: bool) -> Array:
    """Return the kernel of ``shape`` that is zero but for its aligned tap."""
    center = tuple(size // 2 if transposed else (size - 1) // 2 for size in shape[:-2])
    return jnp.zeros(shape, tap.dtype).at[center].set(tap)


def _delta_kernel(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return at_center(haar(key, shape[-2:], dtype), shape, transposed=False)


def _transposed_delta_kernel(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return at_center(haar(key, shape[-2:], dtype), shape, transposed=True)


def _conv_kernel(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    *spatial, inputs, outputs = shape
    few, many = sorted((inputs, outputs))
    steps = [
        axis for step in range(1, max(spatial)) for axis, size in enumerate(spatial) if step < size
    ]
    for_bases, for_ranks = jax.random.split(key)
    first, *bases = haar(for_bases, (1 + len(steps), many, many), dtype)
    chosen = jax.random.bernoulli(for_ranks, 0.5, (len(steps), 1, many)).astype(dtype)
    kernel = jnp.zeros((*spatial, few, many), dtype).at[(0,) * len(spatial)].set(first[:few])
    for axis, basis, own in zip(steps, bases, chosen, strict=True):
        kept = _matmul(kernel, _matmul(basis * own, basis.T))
        # The last tap along the axis is still zero, so nothing comes around.
        kernel = kept + jnp.roll(kernel - kept, 1, axis)
    return kernel if inputs <= outputs else jnp.swapaxes(kernel, -2, -1)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


# At the top level, so that layers of one shape share one program.
@functools.partial(jax.jit, static_argnames=("draw", "shape", "groups", "dtype"))
def _draw_groups(key: Array, draw: Draw, shape: tuple[int, ...], groups: int, dtype: Any) -> Array:
    own = (*shape[:-1], shape[-1] // groups)
    kernels = jax.vmap(lambda key: draw(key, own, dtype))(jax.random.split(key, groups))
    return jnp.moveaxis(kernels, 0, -2).reshape(shape)


def _initializer(draw: Draw, scale: Any, groups: Any, dtype: Any) -> Initializer:
    """Build the initializer that draws a kernel for each group of channels."""
    scale = checks.finite_scalar(scale, "scale")
    groups = checks.integer(groups, low=1, name="feature_group_count")
    default = checks.float_dtype(dtype)

    def init(key: Array, shape: Shape, dtype: DType = default, out_sharding: Any = None) -> Array:
        shape = checks.shape(shape, min_ndim=3)
        dtype = checks.float_dtype(default if dtype is None else dtype)
        if shape[-1] % groups:
            raise checks.value_error(
                "feature_group_count",
                groups,
                f"is outside the divisors of shape[-1]={shape[-1]}",
                "Every group has the same number of outputs.",
            )
        wide = checks.compute_dtype(dtype)
        if math.prod(shape) == 0:
            kernel = jnp.zeros(shape, dtype)
        else:
            kernel = (
                _draw_groups(key, draw, shape, groups, wide) * jnp.asarray(scale, wide)
            ).astype(dtype)
        return kernel if out_sharding is None else jax.sharding.reshard(kernel, out_sharding)

    return init
