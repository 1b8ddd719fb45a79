"""N:M sparsity: of every ``m`` consecutive inputs of an output, exactly ``n`` have a weight.

Some hardware supports such patterns, above all 2:4. Arrays stay dense here, so nothing is faster
than a dense product. :func:`orthogonal` draws exactly orthogonal weights of this pattern, and
:func:`top_n` makes such a mask from scores.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax._internal.haar import haar, haar_by_reflections
from eoi_jax._internal.keys import threefry_key
from eoi_jax.typing import Array, DType

__all__ = ["orthogonal", "top_n"]

# With p parts two outputs have the same support with probability (n / m)^p, unless they are mixed
# with each other, as p outputs are. Beyond 16 the former is rare and only the latter grows.
_MOST_PARTS = 16


def orthogonal(
    key: Array,
    shape: tuple[int, int],
    n: int,
    m: int,
    *,
    scale: float | Array = 1.0,
    dtype: DType = jnp.float32,
) -> Array:
    r"""Draw an exactly orthogonal matrix with N:M sparsity along its inputs.

    Every output has exactly ``n`` non-zeros among the inputs ``g * m, ..., g * m + m - 1``, for
    each group ``g``: the groups lie along the axis that ``x @ w`` contracts, as hardware requires.
    Every input also has the same number of non-zeros, ``outputs * n / m``. The density is always
    ``n / m``.

    The groups of inputs are divided at random into :math:`p` parts, and so are the outputs. In each
    part, inputs and outputs are divided into :math:`m / n` classes, such that each group of inputs
    has :math:`n` members of each class, at random places. Every class is an independent Haar
    matrix. Together they are a block-diagonal matrix :math:`S_c`, which has the pattern in the
    groups of its part. Then sets :math:`\tau` of outputs are formed, with one output from each
    part, and each set is mixed by a Haar matrix :math:`O_\tau` of :math:`p \times p`:

    .. math:: W_{(c, i), (\tau, d)} = S_c[i, \pi_c(\tau)] \; O_\tau[c, d].

    So supports differ between the sets, and no input is disconnected from the others. ``p`` is the
    largest common divisor, up to 16, of the numbers of groups and of outputs of a class.

    Before the factor ``scale`` and the cast to ``dtype``, every non-zero is at least as large as
    the rounding error of 1. So ``w != 0`` is the mask, unless the scale is 0 or the cast itself
    rounds entries to 0, as with 8-bit floats.

    Args:
        key: A random key.
        shape: ``(inputs, outputs)``, static: a multiple of ``m`` and a multiple of ``m / n``.
        n: Non-zeros in a group, a divisor of ``m`` in ``[1, m - 1]``.
        m: Inputs in a group, at least 2.
        scale: The singular value of the result.
        dtype: Real floating dtype of the result. Computed in float32 or wider, cast last.

    Returns:
        A dense array of ``shape`` with orthonormal rows (columns, if there are more rows), times
        ``scale``.

    Raises:
        ValueError: If ``n`` does not divide ``m``, or if ``m`` or ``m / n`` does not divide its
            side of the shape; for a bad ``scale``, ``dtype`` or key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> w = eoi.n_to_m.orthogonal(jax.random.key(0), (64, 128), n=2, m=4)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(64), atol=1e-5))
        True
        >>> counts = (w.reshape(16, 4, 128) != 0).sum(1)  # of each group and output
        >>> bool((counts == 2).all())
        True

    Reference:
        Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, 2021, for the
        pattern. Orthogonal matrices of this pattern are from this library.
    """
    key = threefry_key(key)
    n, m = _check_pattern(n, m)
    inputs, outputs = _check_shape(shape, n, m)
    dtype = checks.float_dtype(dtype)
    scale = jnp.asarray(checks.scale(scale, dtype), checks.compute_dtype(dtype))
    return _draw(key, scale, (inputs, outputs), n, m).astype(dtype)


def top_n(scores: Array, n: int, m: int, *, axis: int = -2) -> Array:
    """Return the N:M mask of the largest scores: ``n`` of every ``m`` along an axis.

    This mask maximizes the sum of the kept scores. Of equal scores the first are kept. With
    magnitudes as scores it is the usual projection of dense weights, ``top_n(abs(w), 2, 4)``.

    Args:
        scores: ``(..., inputs, outputs)`` real: larger scores are kept.
        n: How many to keep in a group, in ``[1, m - 1]``; it need not divide ``m``.
        m: Entries in a group, at least 2, a divisor of the axis.
        axis: The axis of the inputs, along which groups lie. Default: the last but one, as in
            kernels of JAX; ``-1`` for PyTorch's.

    Returns:
        Booleans of the shape of ``scores``.

    Raises:
        ValueError: If an argument is out of range, ``m`` does not divide the axis, or a score is
            NaN. A traced NaN is below every number.

    Example:
        >>> import jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> scores = jnp.array([[4.0], [1.0], [1.0], [3.0], [0.0], [0.0], [0.0], [5.0]])
        >>> eoi.n_to_m.top_n(scores, 2, 4)[:, 0].astype(int).tolist()
        [1, 0, 0, 1, 1, 0, 0, 1]

    Reference:
        Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, 2021.
    """
    m = checks.integer(m, low=2, name="m")
    n = checks.integer(n, low=1, high=m - 1, name="n")
    scores = checks.real_array(scores, "scores")
    if not checks.is_traced(scores) and np.isnan(scores).any():
        raise ValueError("scores has NaN, outside [-inf, inf]. Replace it by -inf to drop those.")
    axis = checks.axis(axis, scores.ndim)
    size = scores.shape[axis]
    if size % m:
        problem = f"is outside the divisors of scores.shape[{axis}]={size}"
        raise checks.value_error("m", m, problem, "Pad the axis, or name another one.")
    last = jnp.moveaxis(scores, axis, -1)
    groups = last.reshape(*last.shape[:-1], size // m, m)
    groups = jnp.where(jnp.isnan(groups), -jnp.inf, groups)
    # Ascending order of the negated scores is stable: of equals the first come first.
    places = jnp.argsort(jnp.argsort(-groups, axis=-1, stable=True), axis=-1)
    return jnp.moveaxis((places < n).reshape(last.shape), -1, axis)


def _check_pattern(n: Any, m: Any) -> tuple[int, int]:
    m = checks.integer(m, low=2, name="m")
    n = checks.integer(n, low=1, high=m - 1, name="n")
    if m % n:
        divisors = ", ".join(str(d) for d in range(1, m) if m % d == 0)
        problem = f"is outside the divisors of m={m} below it"
        raise checks.value_error("n", n, problem, f"Give one of {divisors}.")
    return n, m


def _check_shape(shape: Any, n: int, m: int) -> tuple[int, int]:
    dims = checks.shape(shape)
    if len(dims) != 2 or 0 in dims:
        problem = "is outside (inputs, outputs), both at least 1"
        raise checks.value_error("shape", dims, problem, "Use jax.vmap for a stack of matrices.")
    inputs, outputs = dims
    if inputs % m or outputs % (m // n):
        problem = f"is outside the multiples of (m, m / n) = {(m, m // n)}"
        raise checks.value_error("shape", dims, problem, "Pad the layer to such multiples.")
    return inputs, outputs


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _draw(key: Array, scale: Array, shape: tuple[int, int], n: int, m: int) -> Array:
    (inputs, outputs), classes, dtype = shape, m // n, scale.dtype
    groups = inputs // m
    common = math.gcd(groups, outputs // classes)
    parts = max(d for d in range(1, _MOST_PARTS + 1) if common % d == 0)
    for_blocks, for_mixing, for_meeting, for_places, for_rows, for_columns = jax.random.split(
        key, 6
    )
    start = _block_diagonals(for_blocks, parts, classes, shape, dtype)
    # Outputs meet in an order of each part.
    meeting = jnp.broadcast_to(jnp.arange(outputs // parts), (parts, outputs // parts))
    meeting = jax.random.permutation(for_meeting, meeting, axis=1, independent=True)
    start = jnp.take_along_axis(start, meeting[:, None, :], axis=2)
    mixing = haar_by_reflections(for_mixing, (outputs // parts, parts, parts), dtype)
    # Axes: part, input of the part, set of outputs, output of the set.
    matrix = start[..., None] * mixing.swapaxes(0, 1)[:, None]
    matrix = _at_least_rounding(matrix, start[..., None] != 0).reshape(shape)
    # The inputs are in the order of parts, classes, groups and members of a class in a group.
    rows = jnp.arange(inputs).reshape(parts, classes, groups // parts, n)
    rows = rows.swapaxes(1, 2).reshape(groups, m)
    rows = jax.random.permutation(for_places, rows, axis=1, independent=True)
    rows = jax.random.permutation(for_rows, rows).reshape(-1)
    columns = jax.random.permutation(for_columns, outputs)
    return scale * matrix[rows[:, None], columns]


def _block_diagonals(
    key: Array, parts: int, classes: int, shape: tuple[int, int], dtype: Any
) -> Array:
    """Draw a block-diagonal matrix of Haar blocks for each part, without zeros in a block."""
    rows, columns = (side // (parts * classes) for side in shape)
    blocks = haar(key, (parts, classes, rows, columns), dtype)
    blocks = _at_least_rounding(blocks, jnp.ones_like(blocks, bool))
    diagonal = blocks[:, :, :, None, :] * jnp.eye(classes, dtype=dtype)[:, None, :, None]
    return diagonal.reshape(parts, classes * rows, classes * columns)


def _at_least_rounding(values: Array, support: Array) -> Array:
    """Raise what rounding may have made zero inside the support, which is the mask."""
    least = jnp.finfo(values.dtype).eps
    is_small = support & (jnp.abs(values) < least)
    return jnp.where(is_small, jnp.copysign(least, values), values)
