"""Initializers for Flax, and for anything that takes the initializers of JAX.

Each function returns an ``init(key, shape, dtype, out_sharding=None)`` as the functions of
:mod:`jax.nn.initializers` do. ``out_sharding`` is a :class:`jax.sharding.NamedSharding`, or a
:class:`jax.sharding.PartitionSpec` of the mesh that is entered, along auto or explicit axes. With
it the kernel is drawn into its shards, with the same bits as on one device.

The weights are sparse. To keep them sparse in training, see :mod:`eoi_jax.masks` and
:func:`eoi_jax.optim.static_sparse`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from eoi_jax import givens
from eoi_jax._internal import block_diagonal, checks, fan_axes, shardings
from eoi_jax._internal.conv import (
    Taps,
    allowed_density,
    at_center,
    check_strides,
    check_taps,
    drawn_density,
    place,
)
from eoi_jax._internal.fan_axes import AxisNames
from eoi_jax._internal.haar import haar
from eoi_jax._internal.keys import threefry_key
from eoi_jax.givens import AngleLaw
from eoi_jax.planes import PlaneLaw, check, independent
from eoi_jax.sparse_orthogonal import orthogonal
from eoi_jax.typing import Array, DType, Initializer, Shape

__all__ = ["conv", "conv_orthogonal", "delta_orthogonal", "dense", "sao_conv", "sao_dense"]

_Draw: TypeAlias = Callable[[Array, tuple[int, ...], Any], Array]


def dense(
    density: float | Array,
    *,
    scale: float | Array = 1.0,
    in_axis: AxisNames = -2,
    out_axis: AxisNames = -1,
    batch_axis: AxisNames = (),
    angles: AngleLaw = givens.uniform_angle,
    planes: PlaneLaw = independent,
    permute: bool = False,
    stopping: Literal["closest", "at_most"] = "closest",
    balance_outputs: bool | Array = False,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Sparse, exactly orthogonal kernels for dense layers: EOI as a ``kernel_init``.

    A kernel of shape ``(n, m)`` has orthonormal rows (if :math:`n \le m`) or columns (if
    :math:`n \ge m`), times ``scale``, and a fraction ``density`` of non-zeros, to within
    :math:`1/(2\max(n, m))`.

    Args:
        density: Fraction of non-zeros, in [1/max(n, m), 1]; may be traced.
        scale: Factor of the kernel. ``1.0`` keeps norms; a mean-field critical value keeps the
            signal of a nonlinear network (1.0247 for deep tanh networks).
        in_axis: The axis or axes of inputs. Several axes are one fan, in the order given.
        out_axis: The axis or axes of outputs. Several axes are one fan, in the order given.
        batch_axis: The axis or axes along which a kernel holds several matrices, each drawn with a
            key of its own. Axes that none of the three arguments names count as inputs, before
            those of ``in_axis``: by default the last axis is the outputs, and all others together
            are the inputs. The three arguments have the same meaning as in
            :func:`jax.nn.initializers.variance_scaling`.
        angles: Law of the rotation angles; see :func:`eoi_jax.sparse_orthogonal.orthogonal`.
        planes: Law of the rotations' planes, of :mod:`eoi_jax.planes`.
        permute: Permute rows and columns at random and draw their signs.
        stopping: ``"closest"``, the paper's rule, or ``"at_most"``, which never exceeds the target
            count, so that :func:`eoi_jax.masks.fill` can make the count exact.
        balance_outputs: Whether, with more outputs than inputs, each output has a norm of at least
            half of the root mean square, which is :math:`\sqrt{n/m}` times ``scale``. Then no unit
            before a normalization is dead. It takes a density of at least :math:`1/n`.
        dtype: The dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)``.

    Raises:
        ValueError: Here for a density outside (0, 1] or a bad ``scale``, ``dtype``,
            ``planes`` or ``balance_outputs``; from ``init`` for a density below the shape's
            minimum, for a shape with fewer than two axes, or if the axes are not in the shape or
            one is named twice.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> layer = nn.Dense(512, kernel_init=eoi.dense(density=0.1))
        >>> kernel = layer.init(jax.random.key(0), jnp.ones((1, 256)))["params"]["kernel"]
        >>> kernel.shape, round(float((kernel != 0).mean()), 3)
        ((256, 512), 0.1)

        The queries of attention, ``(inputs, heads, size of a head)``, as one matrix of 64 x 64:

        >>> init = eoi.dense(0.1, in_axis=0, out_axis=(1, 2))
        >>> query = init(jax.random.key(0), (64, 4, 16)).reshape(64, 64)
        >>> bool(jnp.allclose(query.T @ query, jnp.eye(64), atol=1e-5))
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.1.
    """
    checks.density(density)
    checks.number(scale, "scale")
    check(planes)
    balance_outputs = checks.balance(balance_outputs, planes)
    axes = _axes(in_axis, out_axis, batch_axis)

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return orthogonal(
            key,
            shape,
            density,
            scale=scale,
            dtype=dtype,
            angles=angles,
            planes=planes,
            permute=permute,
            stopping=stopping,
            balance_outputs=balance_outputs,
        )

    return _initializer(_along(axes, draw), dtype)


def conv(
    density: float | Array,
    *,
    scale: float | Array = 1.0,
    taps: Taps = "center",
    strides: int | Shape = 1,
    center_density: float | Array | None = None,
    feature_group_count: int = 1,
    transposed: bool = False,
    angles: AngleLaw = givens.uniform_angle,
    planes: PlaneLaw = independent,
    permute: bool = False,
    balance_outputs: bool | None = None,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Sparse, exactly orthogonal kernels for convolutions of any number of spatial axes.

    The kernel holds one sparse orthogonal matrix :math:`H`, ``(inputs, outputs)`` of density
    :math:`d_H`, each entry at one of the :math:`k` taps:

    .. math:: W_{t(c, o), c, o} = H_{c o}, \qquad
              d_H = \min(\text{density} \cdot k, \sqrt{\text{density}}, 1)

    but at least the minimum :math:`1/N` of :math:`H`. Where the first term is the smallest,
    :math:`d_H` is :math:`1/(2N)` less, so that ``density`` is never exceeded. ``taps`` chooses the
    taps:

    * ``"center"``: all entries at the center, the delta-orthogonal kernel of the paper. At the
      start, each output pixel depends on one input pixel.
    * ``"spread"``: each input channel at a tap of its own, drawn uniformly from the window.
    * ``"spread_both"``: the place along the first axis of the window depends on the input channel,
      the places along the other axes on the output channel. In one dimension it is ``"spread"``.

    Spreading shifts each input channel before :math:`H`, and each output channel after it, by
    whole pixels, which is a permutation of pixels. So in all three cases, under circular padding,
    stride 1 and any dilation, the layer keeps norms exactly if no group has more input channels
    than output channels. With more inputs than outputs it is a co-isometry, with singular values 1
    or 0. The kernel has a fraction :math:`d_H / k \le` ``density`` of non-zeros;
    :func:`eoi_jax.masks.fill` unmasks further weights, which are zero at the start and may learn,
    up to ``density``.

    Where :math:`H` has more columns than rows, the paper's law gives some outputs that are zero or
    nearly zero, and a normalization multiplies their gradients by the inverse of their norm. With
    ``balance_outputs`` no output has a norm below half of the root mean square,
    :math:`\sqrt{\text{rows} / \text{outputs}}`, as described at
    :func:`eoi_jax.sparse_orthogonal.orthogonal`, and :math:`H` has at least one non-zero for each
    output.

    Padding by zeros loses what is shifted over the border of the image: with spread taps a 3 x 3
    layer loses about 4 % of the energy of white noise at 32 x 32 pixels, and 8 % at 16 x 16; with
    center taps it loses nothing. VALID padding crops the image.

    With ``strides`` above 1, :math:`H` has a row for each input channel of each of the :math:`S`
    phases, the positions within a cell of ``strides`` pixels (space to depth). Its shape is
    ``(S inputs, outputs)`` and its density
    :math:`\min(\text{density} \cdot k / S, \sqrt{\text{density}}, 1)`. Every pixel is used, and the
    layer is an exact isometry or co-isometry from all pixels, under circular padding of sizes that
    the strides divide. A kernel for stride 1 in such a layer only subsamples. The table shows how
    much of the energy of white noise a 3 x 3 layer of 16 channels at stride 2, 32 x 32 pixels,
    keeps, under circular padding and with zeros around the image:

    ================================ ============ ===================================
    layer                            circular     zeros: center, spread, spread_both
    ================================ ============ ===================================
    16 to 32, kernels for stride 1   25 %         25, 24, 24 %
    16 to 32, ``strides=2``          50 %         47, 48, 48 %
    16 to 64, kernels for stride 1   25 %         25, 24, 24 %
    16 to 64, ``strides=2``          100 %        94, 97, 95 %
    ================================ ============ ===================================

    Args:
        density: Fraction of weights of the whole kernel to keep, in (0, 1]; may be traced.
        scale: Factor of the kernel.
        taps: ``"center"``, ``"spread"`` or ``"spread_both"``.
        strides: The strides of the layer, one number or one for each axis of the window; each is
            at least 1 and at most the window's size along its axis.
        center_density: Density of :math:`H`, in [1/N, 1]; default by the rule above. Where it is
            all that ``density`` allows, it is :math:`1/(2N)` less.
            ``density`` itself is the paper's choice for its 1000-layer network.
        feature_group_count: Groups of channels, as in :class:`flax.linen.Conv`. Every group is an
            isometry of its own; a depthwise kernel has ``scale`` at its center.
        transposed: Whether the kernel is for a transposed convolution
            (:class:`flax.linen.ConvTranspose` with its default ``transpose_kernel=False``): the
            aligned tap of an even size ``k`` is then ``k // 2`` and not ``(k - 1) // 2``.
        angles: Law of the rotation angles; see :func:`eoi_jax.sparse_orthogonal.orthogonal`.
        planes: Law of the rotations' planes, of :mod:`eoi_jax.planes`.
        permute: Permute channels at random and draw signs.
        balance_outputs: Whether, with more outputs than rows of :math:`H`, each output has a norm
            of at least half of the root mean square; see above. Default: True with spread taps if
            the density allows every output a non-zero, and False with center taps. ``True`` refuses
            a density that is too small for it; ``False`` reproduces the paper.
        dtype: The dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, inputs / groups, outputs)``.

    Raises:
        ValueError: Here for a density outside (0, 1] or bad ``planes``; from ``init`` for a shape
            with fewer than three axes, outputs that the groups do not divide, strides that the
            window does not cover, a ``density`` too small for :math:`H`, or a ``center_density``
            with more weights than ``density`` allows.

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
        Xiao et al., "Dynamical Isometry and a Mean Field Theory of CNNs", ICML 2018, Algorithm 2;
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.2; for strided
        orthogonal kernels Boissin et al., "An Adaptive Orthogonal Convolution Scheme for Efficient
        and Flexible CNN Architectures", ICML 2025. Spread taps are derived in this library.
    """
    checks.density(density)
    checks.number(scale, "scale")
    check_taps(taps)
    check(planes)
    balance_outputs = checks.balance(balance_outputs, planes, optional=True)
    groups = checks.integer(feature_group_count, low=1, name="feature_group_count")
    if center_density is not None:
        checks.density(center_density, name="center_density")

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        *window, inputs, outputs = shape
        steps = check_strides(strides, window, transposed=transposed)
        cell = 1 if steps is None else math.prod(steps)
        rows = cell * inputs
        num_taps = math.prod(window) / cell
        most = density * num_taps if center_density is None else center_density
        balanced = _is_balanced(balance_outputs, taps != "center", most, rows, outputs)
        matrix_density = _tap_density(
            density, center_density, num_taps, max(rows, outputs), 1 / rows, balanced
        )
        matrix = orthogonal(
            key,
            (rows, outputs),
            matrix_density,
            scale=scale,
            dtype=dtype,
            angles=angles,
            planes=planes,
            permute=permute,
            balance_outputs=balanced,
        )
        return place(key, matrix, shape, taps, strides=steps, transposed=transposed)

    return _initializer(_grouped(draw, groups), dtype, min_ndim=3)


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
    matrix. :func:`jax.nn.initializers.delta_orthogonal` draws from the same law, but has no groups,
    takes only three to five axes, and refuses more inputs than outputs.

    Args:
        scale: Factor of the kernel; may be traced.
        feature_group_count: Groups of channels, as in :class:`flax.linen.Conv`; every group has a
            matrix of its own.
        transposed: Whether the kernel is for a transposed convolution
            (:class:`flax.linen.ConvTranspose` with its default ``transpose_kernel=False``): the
            aligned tap of an even size ``k`` is then ``k // 2`` and not ``(k - 1) // 2``.
        dtype: The dtype if ``init`` is called without one. float16 and bfloat16 are computed in
            float32 and cast last.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, inputs / groups, outputs)``.

    Raises:
        ValueError: Here for a bad ``scale``, ``feature_group_count`` or ``dtype``; from ``init``
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
        Xiao et al., "Dynamical Isometry and a Mean Field Theory of CNNs", ICML 2018, Algorithm 2.
    """
    draw = _transposed_delta_kernel if transposed else _delta_kernel
    return _dense_initializer(draw, scale, feature_group_count, dtype)


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
    a kernel with inputs and outputs swapped. This is a co-isometry: a fraction
    ``outputs / inputs`` of its singular values are ``scale`` and the rest 0.

    On average, tap :math:`p` has the fraction :math:`\prod_a \binom{k_a - 1}{p_a} 2^{1 - k_a}` of
    the squared norm. Norms are kept only under circular padding and stride 1: SAME and VALID
    padding cut off what crosses the border.

    Args:
        scale: Factor of the kernel; may be traced.
        feature_group_count: Groups of channels, as in :class:`flax.linen.Conv`; every group has a
            kernel of its own.
        dtype: The dtype if ``init`` is called without one. float16 and bfloat16 are computed in
            float32 and cast last.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, inputs / groups, outputs)``, for both :class:`flax.linen.Conv` and
        :class:`flax.linen.ConvTranspose`.

    Raises:
        ValueError: Here for a bad ``scale``, ``feature_group_count`` or ``dtype``; from ``init``
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
        Xiao et al., "Dynamical Isometry and a Mean Field Theory of CNNs", ICML 2018, Algorithm 1,
        here for any number of spatial axes, also of different sizes.
    """
    return _dense_initializer(_conv_kernel, scale, feature_group_count, dtype)


def sao_dense(
    density: float,
    *,
    activation: block_diagonal.Activation = "tanh",
    scale: float | Array = 1.0,
    in_axis: AxisNames = -2,
    out_axis: AxisNames = -1,
    batch_axis: AxisNames = (),
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Block-sparse orthogonal kernels for square dense layers: the SAO baseline.

    Every row and column of the ``(n, n)`` kernel has the same number :math:`d` of non-zeros, its
    degree, and ``density`` is :math:`d/n`; see :func:`eoi_jax.sao.orthogonal` for the law.

    Args:
        density: Degree divided by width, static: the degree divides the width and is at least 2,
            or even and at least 4 for ``activation="relu"``; see :func:`eoi_jax.sao.degree`.
        activation: ``"tanh"``, an orthogonal matrix, or ``"relu"``, the pairs for ReLU layers.
        scale: Factor of the kernel; may be traced.
        in_axis: The axis or axes of inputs, as in :func:`dense`.
        out_axis: The axis or axes of outputs.
        batch_axis: The axis or axes along which a kernel holds several matrices.
        dtype: The dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)``; axes of ``shape`` without a name
        belong to the inputs.

    Raises:
        ValueError: Here for a density outside (0, 1] or traced, an unknown activation, or a bad
            ``scale`` or ``dtype``; from ``init`` for a kernel that is not square, which the method
            leaves dense, or a density that its width cannot have (the message names the nearest
            possible densities).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flax.linen as nn
        >>> import eoi_jax as eoi
        >>> layer = nn.Dense(128, kernel_init=eoi.initializers.sao_dense(density=0.125))
        >>> kernel = layer.init(jax.random.key(0), jnp.ones((1, 128)))["params"]["kernel"]
        >>> sorted(set((kernel != 0).sum(axis=0).tolist() + (kernel != 0).sum(axis=1).tolist()))
        [16]

    Reference:
        Esguerra et al., "Sparsity-Aware Orthogonal Initialization of Deep Neural Networks",
        IEEE Access 2023.
    """
    density = block_diagonal.check_density(density)
    activation = block_diagonal.check_activation(activation)
    checks.number(scale, "scale")
    axes = _axes(in_axis, out_axis, batch_axis)

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        inputs, outputs = shape
        return block_diagonal.kernel_matrix(key, inputs, outputs, density, activation, scale, dtype)

    return _initializer(_along(axes, draw), dtype)


def sao_conv(
    density: float,
    *,
    activation: block_diagonal.Activation = "tanh",
    scale: float | Array = 1.0,
    transposed: bool = False,
    dtype: DType = jnp.float32,
) -> Initializer:
    r"""Block-sparse orthogonal kernels for convolutions that keep the width: the SAO baseline.

    The kernel is zero except at its center tap, which holds a matrix of
    :func:`eoi_jax.sao.orthogonal`. The method connects pairs of channels, so all taps of a pair
    whose center is non-zero may learn: the mask is larger than the kernel's support. ``density``,
    degree divided by width, is the density of the mask and of the center tap; the kernel itself
    has a fraction ``density / taps`` of non-zeros.

    Args:
        density: Fraction of channel pairs that are connected, degree divided by width, static: the
            degree divides the width and is at least 2, or for ``activation="relu"`` even and at
            least 4.
        activation: ``"tanh"``, an orthogonal matrix, or ``"relu"``, the pairs for ReLU layers.
        scale: Factor of the kernel; may be traced.
        transposed: Whether the kernel is for a transposed convolution, as in :func:`conv`.
        dtype: The dtype if ``init`` is called without one.

    Returns:
        ``init(key, shape, dtype=dtype, out_sharding=None)`` for kernels of shape
        ``(*spatial, width, width)``.

    Raises:
        ValueError: Here for a density outside (0, 1] or traced, an unknown activation, or a bad
            ``scale`` or ``dtype``; from ``init`` for a shape with fewer than three axes or other
            inputs than outputs (the first convolution of a network, or one in groups), which the
            method leaves dense, or a density that the width cannot have.

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
        Esguerra et al., "Sparsity-Aware Orthogonal Initialization of Deep Neural Networks",
        IEEE Access 2023.
    """
    density = block_diagonal.check_density(density)
    activation = block_diagonal.check_activation(activation)
    checks.number(scale, "scale")

    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        options = (density, activation, scale, dtype)
        tap = block_diagonal.kernel_matrix(key, shape[-2], shape[-1], *options)
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        return at_center(tap, shape, transposed=transposed)

    return _initializer(draw, dtype, min_ndim=3)


def _initializer(draw: _Draw, dtype: DType, *, min_ndim: int = 2) -> Initializer:
    """Build what JAX and Flax call from ``draw(key, shape, dtype)``."""
    default = checks.float_dtype(dtype)

    def init(key: Array, shape: Shape, dtype: DType = default, out_sharding: Any = None) -> Array:
        key = threefry_key(key)
        shape = checks.shape(shape, min_ndim=min_ndim)
        dtype = checks.float_dtype(default if dtype is None else dtype)
        if out_sharding is None:
            return draw(key, shape, dtype)
        out = shardings.named(out_sharding, len(shape))
        return shardings.drawn(lambda key: [draw(key, shape, dtype)], key, [out])[0]

    return init


def _axes(in_axis: Any, out_axis: Any, batch_axis: Any) -> tuple[Any, Any, Any]:
    """Accept the axes of kernels of any shape."""
    for name, axes in (("in_axis", in_axis), ("out_axis", out_axis), ("batch_axis", batch_axis)):
        fan_axes.check(axes, name)
    return in_axis, out_axis, batch_axis


def _along(axes: tuple[Any, Any, Any], draw: _Draw) -> _Draw:
    """Draw matrices ``(inputs, outputs)`` along the named axes of a kernel."""

    def along(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        named = fan_axes.resolve(*axes, len(shape))
        view = fan_axes.View(shape, 0, named)
        matrix = (math.prod(view.taps) * view.inputs, view.outputs)
        if not named.batch:
            return view.from_layers(draw(key, matrix, dtype))
        if view.matrices == 0:
            return jnp.zeros(shape, dtype)
        keys = jax.random.split(key, view.matrices)
        return view.from_matrices(jax.vmap(lambda key: draw(key, matrix, dtype))(keys))

    return along


def _grouped(draw: _Draw, groups: int) -> _Draw:
    """Draw a kernel for each group of channels, and zeros where a side is empty."""

    def grouped(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        checks.feature_groups(groups, shape[-1])
        if math.prod(shape) == 0:
            return jnp.zeros(shape, dtype)
        of_group = (*shape[:-1], shape[-1] // groups)
        return fan_axes.side_by_side(lambda key: draw(key, of_group, dtype), groups)(key)

    return grouped


def _dense_initializer(draw: _Draw, scale: Any, groups: Any, dtype: Any) -> Initializer:
    """Build the initializer of a dense kernel, drawn for each group in float32 or wider."""
    scale = checks.number(scale, "scale")
    groups = checks.integer(groups, low=1, name="feature_group_count")

    def scaled(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        checks.scale(scale, dtype)
        compute_dtype = checks.compute_dtype(dtype)
        kernel = _draw_dense(key, draw, shape, groups, compute_dtype)
        return (kernel * jnp.asarray(scale, compute_dtype)).astype(dtype)

    return _initializer(scaled, dtype, min_ndim=3)


# At the top level, so that layers of one shape share one program.
@functools.partial(jax.jit, static_argnames=("draw", "shape", "groups", "dtype"))
def _draw_dense(key: Array, draw: _Draw, shape: tuple[int, ...], groups: int, dtype: Any) -> Array:
    return _grouped(draw, groups)(key, shape, dtype)


def _delta_kernel(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return at_center(haar(key, shape[-2:], dtype), shape)


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
    for axis, basis, is_kept in zip(steps, bases, chosen, strict=True):
        kept = _matmul(kernel, _matmul(basis * is_kept, basis.T))
        # The last tap along the axis is still zero, so nothing comes around.
        kernel = kept + jnp.roll(kernel - kept, 1, axis)
    return kernel if inputs <= outputs else jnp.swapaxes(kernel, -2, -1)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _is_balanced(
    balance: bool | None, is_spread: bool, most: Any, rows: int, outputs: int
) -> bool | Array:
    """Whether outputs are balanced: by default where taps are spread and the density allows it.

    ``most`` is the density that a matrix of ``rows`` by ``outputs`` may have.
    """
    if rows >= outputs or balance is False:
        return False
    if balance is None:
        suffices = most * rows >= 1 - 1e-6  # a non-zero for each output
        return is_spread and (suffices if checks.is_traced(suffices) else bool(suffices))
    return balance


def _tap_density(
    density: Any, center_density: Any, num_taps: float, size: int, least: float, balanced: Any
) -> Any:
    """Density of the center tap, between what a matrix of that size needs and what is allowed.

    ``least`` is what balanced outputs need.
    """
    minimum = 1 / size
    need = f"holds orthogonal matrices whose larger side is {size}, which take"
    why = f"An orthogonal matrix with a larger side of {size} has no fewer non-zeros."
    if balanced is True:
        minimum = least
        need = "has a non-zero for each output (balance_outputs=True), which takes"
        why = "With balance_outputs=True each output has a non-zero."
    lowest = jnp.where(balanced, least, minimum) if checks.is_traced(balanced) else minimum
    remedy = (
        f"The kernel of {num_taps:g} taps {need} a density of at least {minimum / num_taps:.6g} of "
        f"the whole kernel: raise the density, or leave "
        f"{'balance_outputs out' if balanced is True else 'this layer dense'}."
    )
    density = checks.density(density, minimum=minimum / num_taps, why=remedy)
    if center_density is None:
        wanted = drawn_density(density, num_taps, size, lowest)
        if not checks.is_traced(density):
            return wanted
    else:
        wanted = checks.density(center_density, name="center_density", minimum=minimum, why=why)
    # The draw ends up to half a step above its target, as in drawn_density.
    room = allowed_density(density, num_taps, 1 / (2 * size))
    allowed = (density <= 1) & (wanted <= density * num_taps * (1 + 1e-6))
    if checks.is_traced(allowed):
        wanted = jnp.maximum(jnp.minimum(wanted, room), lowest)
        return jnp.where(allowed, wanted, jnp.nan)  # a matrix of NaN, so that the excess shows
    if not allowed:
        raise checks.value_error(
            "center_density",
            wanted,
            f"is outside [{minimum:.6g}, {min(density * num_taps, 1.0):.6g}]",
            f"The kernel has density={density} and {num_taps:g} taps: raise density, or lower "
            "center_density.",
        )
    return max(min(wanted, float(room)), minimum)
