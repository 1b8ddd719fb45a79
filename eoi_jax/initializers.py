"""Initializers for Flax, and for anything that takes the initializers of JAX.

Each function returns an ``init(key, shape, dtype, out_sharding=None)`` of the protocol of
:mod:`jax.nn.initializers`. The weights are sparse; to keep them so while they train, see
:mod:`eoi_jax.masks` and :func:`eoi_jax.optim.static_sparse`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from eoi_jax import givens, sao
from eoi_jax._internal import checks
from eoi_jax._internal.haar import at_center, conv_orthogonal, delta_orthogonal
from eoi_jax.givens import AngleLaw
from eoi_jax.sao import Form
from eoi_jax.sparse_orthogonal import orthogonal
from eoi_jax.typing import Array, DType, Initializer, Shape

__all__ = ["conv", "conv_orthogonal", "delta_orthogonal", "dense", "sao_conv", "sao_dense"]


def dense(
    density: float | Array,
    *,
    scale: float | Array = 1.0,
    column_axis: int = -1,
    angles: AngleLaw = givens.uniform_angle,
    permute: bool = False,
    stopping: Literal["closest", "at_most"] = "closest",
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Sparse, exactly orthogonal kernels for dense layers: EOI as a ``kernel_init``.

    A kernel of shape ``(n, m)`` has orthonormal rows or columns times ``scale``, whichever side is
    smaller, and a fraction ``density`` of non-zeros, to within :math:`1/(2\max(n, m))`.

    Args:
        density: fraction of non-zeros, in [1/max(n, m), 1]; may be traced.
        scale: factor of the kernel; ``1.0`` keeps norms, a mean-field critical value keeps the
            signal of a nonlinear network (1.0247 for deep tanh networks).
        column_axis: the axis of outputs; all other axes together are the inputs.
        angles: law of the rotation angles; see :func:`eoi_jax.sparse_orthogonal.orthogonal`.
        permute: permute rows and columns at random and draw their signs.
        stopping: ``"closest"``, the paper's rule, or ``"at_most"``, which never exceeds the budget
            and so leaves room for :func:`eoi_jax.masks.fill` to make the count exact.
        dtype: the dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)``.

    Raises:
        ValueError: here for a density outside (0, 1] or a bad ``scale`` or ``dtype``; from ``init``
            for a density below the shape's minimum or a shape with fewer than two axes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> layer = nn.Dense(512, kernel_init=eoi.dense(density=0.1))
        >>> kernel = layer.init(jax.random.key(0), jnp.ones((1, 256)))["params"]["kernel"]
        >>> kernel.shape, round(float((kernel != 0).mean()), 3)
        ((256, 512), 0.1)

    Reference:
        Nowak et al., *Sparser, Better, Deeper, Stronger* (ICML 2024), section 4.1.
    """
    checks.density(density)
    checks.finite_scalar(scale, "scale")
    default = checks.float_dtype(dtype)

    def init(key: Array, shape: Shape, dtype: DType = default, out_sharding: Any = None) -> Array:
        kernel = orthogonal(
            key,
            shape,
            density,
            scale=scale,
            dtype=default if dtype is None else dtype,
            column_axis=column_axis,
            angles=angles,
            permute=permute,
            stopping=stopping,
        )
        return _shard(kernel, out_sharding)

    return init


def conv(
    density: float | Array,
    *,
    scale: float | Array = 1.0,
    center_density: float | Array | None = None,
    feature_group_count: int = 1,
    transposed: bool = False,
    angles: AngleLaw = givens.uniform_angle,
    permute: bool = False,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Sparse, exactly orthogonal kernels for convolutions of any number of spatial axes.

    The kernel is delta-orthogonal: zero everywhere but at its center tap, which holds a sparse
    orthogonal matrix :math:`H` of density :math:`d_H`, so that

    .. math:: W_{p,:,:} = \delta_{p,c} H, \qquad
              d_H = \min(\text{density} \cdot k, \sqrt{\text{density}}, 1)

    with :math:`k` the number of taps (and at least the :math:`1/N` that :math:`H` can have; where
    the first term binds, :math:`1/(2N)` less, so that the budget is never exceeded). The
    kernel has :math:`d_H / k \le` ``density`` non-zeros; :func:`eoi_jax.masks.fill` opens further
    weights, which are zero now and may learn, up to ``density``.

    Such a layer multiplies every pixel by :math:`H`: it keeps norms exactly where output and input
    grids align (circular or SAME padding, stride 1) and the input channels of a group are no more
    than its output channels. With more inputs than outputs it is a co-isometry, singular values 1
    or 0. VALID padding crops and strides subsample.

    Args:
        density: fraction of weights of the whole kernel to keep, in (0, 1]; may be traced.
        scale: factor of the kernel.
        center_density: density of the center tap, in [1/N, 1]; default by the rule above.
            ``density`` itself is the paper's choice for its 1000-layer network.
        feature_group_count: groups of channels, as in :class:`flax.linen.Conv`. Every group is an
            isometry of its own; a depthwise kernel has ``scale`` at its center.
        transposed: whether the kernel is for a transposed convolution
            (:class:`flax.linen.ConvTranspose` with its default ``transpose_kernel=False``): the
            aligned tap of an even size ``k`` is then ``k // 2`` and not ``(k - 1) // 2``.
        angles: law of the rotation angles; see :func:`eoi_jax.sparse_orthogonal.orthogonal`.
        permute: permute channels at random and draw signs.
        dtype: the dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, inputs / groups, outputs)``.

    Raises:
        ValueError: here for a density outside (0, 1]; from ``init`` for a shape with fewer than
            three axes, outputs that the groups do not divide, a ``density`` too small for
            :math:`H`, or a ``center_density`` with more weights than ``density`` allows.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> layer = nn.Conv(64, (3, 3), padding="CIRCULAR", kernel_init=eoi.conv(density=0.1))
        >>> x = jax.random.normal(jax.random.key(1), (1, 8, 8, 32))
        >>> variables = layer.init(jax.random.key(0), x)
        >>> y = layer.apply(variables, x)
        >>> bool(jnp.allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5))
        True

    Reference:
        Xiao et al., *Dynamical Isometry and a Mean Field Theory of CNNs* (ICML 2018), Algorithm 2;
        Nowak et al. (ICML 2024), section 4.2.
    """
    checks.density(density)
    checks.finite_scalar(scale, "scale")
    groups = checks.integer(feature_group_count, low=1, name="feature_group_count")
    default = checks.float_dtype(dtype)
    if center_density is not None:
        checks.density(center_density, name="center_density")

    def init(key: Array, shape: Shape, dtype: DType = default, out_sharding: Any = None) -> Array:
        shape = checks.shape(shape, min_ndim=3)
        dtype = checks.float_dtype(default if dtype is None else dtype)
        *spatial, inputs, outputs = shape
        if outputs % groups:
            raise checks.value_error(
                "feature_group_count",
                groups,
                f"is outside the divisors of shape[-1]={outputs}",
                "Every group has the same number of outputs.",
            )
        if math.prod(shape) == 0:
            return _shard(jnp.zeros(shape, dtype), out_sharding)
        block = (inputs, outputs // groups)
        own = _center_density(density, center_density, math.prod(spatial), max(block))

        def draw(key: Array) -> Array:
            return orthogonal(
                key, block, own, scale=scale, dtype=dtype, angles=angles, permute=permute
            )

        matrices = jax.vmap(draw)(jax.random.split(key, groups))
        center = tuple(size // 2 if transposed else (size - 1) // 2 for size in spatial)
        tap = jnp.moveaxis(matrices, 0, 1).reshape(inputs, outputs)
        return _shard(jnp.zeros(shape, dtype).at[center].set(tap), out_sharding)

    return init


def sao_dense(
    density: float,
    *,
    form: Form = "tanh",
    scale: float | Array = 1.0,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Block-sparse orthogonal kernels for square dense layers: the SAO baseline.

    Every row and column of the ``(n, n)`` kernel has the same number :math:`d` of non-zeros, its
    degree, and ``density`` is :math:`d/n`; see :func:`eoi_jax.sao.orthogonal` for the law.

    Args:
        density: degree divided by width, static: the degree divides the width and is at least 2,
            or even and at least 4 for ``form="relu"``; see :func:`eoi_jax.sao.degree`.
        form: ``"tanh"``, an orthogonal matrix, or ``"relu"``, the pairs for ReLU layers.
        scale: factor of the kernel; may be traced.
        dtype: the dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)``; all axes of ``shape`` but the last
        together are the inputs.

    Raises:
        ValueError: here for a density outside (0, 1] or traced, an unknown form, or a bad ``scale``
            or ``dtype``; from ``init`` for a kernel that is not square, which the method leaves
            dense, or a density that its width cannot have (the nearest feasible ones are named).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> layer = nn.Dense(128, kernel_init=eoi.initializers.sao_dense(density=0.125))
        >>> kernel = layer.init(jax.random.key(0), jnp.ones((1, 128)))["params"]["kernel"]
        >>> sorted(set((kernel != 0).sum(axis=0).tolist() + (kernel != 0).sum(axis=1).tolist()))
        [16]

    Reference:
        Esguerra et al., *Sparsity-Aware Orthogonal Initialization of Deep Neural Networks* (IEEE
        Access 2023).
    """
    density, form = sao.check_density(density), sao.check_form(form)
    checks.finite_scalar(scale, "scale")
    default = checks.float_dtype(dtype)

    def init(key: Array, shape: Shape, dtype: DType = default, out_sharding: Any = None) -> Array:
        shape = checks.shape(shape)
        dtype = default if dtype is None else dtype
        inputs, outputs = math.prod(shape[:-1]), shape[-1]
        matrix = sao.kernel_matrix(key, inputs, outputs, density, form, scale, dtype)
        return _shard(matrix.reshape(shape), out_sharding)

    return init


def sao_conv(
    density: float,
    *,
    form: Form = "tanh",
    scale: float | Array = 1.0,
    transposed: bool = False,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Block-sparse orthogonal kernels for convolutions that keep the width: the SAO baseline.

    The kernel is zero everywhere but at its center tap, which holds a matrix of
    :func:`eoi_jax.sao.orthogonal`. A connection of the method is a pair of channels, so all taps
    of a pair whose center is nonzero may learn: the mask is larger than the kernel's support, and
    ``density`` is that of the mask and of the center tap, degree divided by width, while the
    kernel has ``density / taps`` non-zeros.

    Args:
        density: fraction of channel pairs that are connected, degree divided by width, static: the
            degree divides the width and is at least 2, or even and at least 4 for ``form="relu"``.
        form: ``"tanh"``, an orthogonal matrix, or ``"relu"``, the pairs for ReLU layers.
        scale: factor of the kernel; may be traced.
        transposed: whether the kernel is for a transposed convolution, as in :func:`conv`.
        dtype: the dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, width, width)``.

    Raises:
        ValueError: here for a density outside (0, 1] or traced, an unknown form, or a bad ``scale``
            or ``dtype``; from ``init`` for a shape with fewer than three axes or other inputs than
            outputs (the first convolution of a network, or one in groups), which the method leaves
            dense, or a density that the width cannot have.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> init = eoi.initializers.sao_conv(density=0.125)
        >>> layer = nn.Conv(64, (3, 3), padding="CIRCULAR", kernel_init=init)
        >>> x = jax.random.normal(jax.random.key(1), (1, 8, 8, 64))
        >>> y, variables = layer.init_with_output(jax.random.key(0), x)
        >>> bool(jnp.allclose(jnp.linalg.norm(y), jnp.linalg.norm(x), rtol=1e-5))
        True
        >>> connected = variables["params"]["kernel"].any(axis=(0, 1))
        >>> float(connected.mean())
        0.125

    Reference:
        Esguerra et al. (IEEE Access 2023).
    """
    density, form = sao.check_density(density), sao.check_form(form)
    checks.finite_scalar(scale, "scale")
    default = checks.float_dtype(dtype)

    def init(key: Array, shape: Shape, dtype: DType = default, out_sharding: Any = None) -> Array:
        shape = checks.shape(shape, min_ndim=3)
        dtype = default if dtype is None else dtype
        inputs, outputs = shape[-2:]
        tap = sao.kernel_matrix(key, inputs, outputs, density, form, scale, dtype)
        return _shard(at_center(tap, shape, transposed=transposed), out_sharding)

    return init


def _center_density(density: Any, center_density: Any, taps: int, size: int) -> Any:
    """Density of the center tap, between what a matrix of that size needs and what is allowed."""
    minimum = 1 / size
    remedy = (
        f"The center tap of {taps} holds orthogonal matrices with a larger side of {size}, which "
        f"take a density of at least {minimum / taps:.6g} of the whole kernel: raise the density, "
        "or leave this layer dense."
    )
    density = checks.density(density, minimum=minimum / taps, why=remedy)
    if center_density is None:
        # The matrix ends up to half a step, 1 / (2 size), from its target: the room is left so that
        # it never exceeds the kernel's budget, which no support can be trimmed to.
        if not checks.is_traced(density):
            room = density * taps - (minimum / 2 if density < 1 else 0.0)
            return max(min(room, math.sqrt(density), 1.0), minimum)
        room = density * taps - jnp.where(density < 1, minimum / 2, 0.0)
        rule = jnp.minimum(jnp.minimum(room, jnp.sqrt(density)), 1.0)
        own = jnp.maximum(rule, minimum)
    else:
        own = checks.density(
            center_density,
            name="center_density",
            minimum=minimum,
            why=f"An orthogonal matrix with a larger side of {size} has no fewer non-zeros.",
        )
    allowed = (density <= 1) & (own <= density * taps * (1 + 1e-6))
    if checks.is_traced(allowed):
        return jnp.where(allowed, own, jnp.nan)  # a matrix of NaN, and no quiet excess
    if not allowed:
        raise checks.value_error(
            "center_density",
            own,
            f"is outside [{minimum:.6g}, {min(density * taps, 1.0):.6g}]",
            f"The budget is density={density} of {taps} taps: raise it or lower the center's.",
        )
    return own


def _shard(kernel: Array, out_sharding: Any) -> Array:
    return kernel if out_sharding is None else jax.sharding.reshard(kernel, out_sharding)
