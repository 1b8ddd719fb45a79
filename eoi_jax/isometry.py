r"""Approximated isometry (AI): values on a given mask that make a matrix nearly orthogonal.

Use it for a mask that is given, such as the mask of a pruning method. If the mask may be chosen,
:func:`eoi_jax.sparse_orthogonal.orthogonal` draws an exactly orthogonal matrix.

The mask of a pruning method is usually not the support of an orthogonal matrix. AI keeps the mask
and changes only the values. The mask alone decides what any method can reach. No values have a rank
above the :func:`structural_rank` :math:`r` of the mask. And since :math:`r` entries of the mask lie
in different rows and columns, some values on it have exactly :math:`r` singular values 1, and all
others 0. So a mask of full structural rank always admits exact isometry, if only by a permutation
matrix on its smaller side.

On a sparse mask, exact isometry has a cost: two rows with only one common column are orthogonal
only if one of their two weights in this column is 0. A sparse random mask has many such pairs, so
the values on it become nearly isometric by moving most of the weights towards zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse import csgraph, csr_matrix

from eoi_jax._internal import checks
from eoi_jax.typing import Array

__all__ = ["approximate_isometry", "structural_rank"]

# Square roots of the first and the last regularization of log_det. Singular values well below it
# count as 0. The first is just above what float32 resolves, about 1e-6 in matrices of norm 1, to
# lift what can be lifted; the last is far above it, or rounding would shake what must stay 0.
_FIRST_FLOOR, _LAST_FLOOR = 1e-5, 1e-2


def approximate_isometry(
    kernel: Array,
    mask: Any,
    *,
    scale: Any = 1.0,
    objective: Literal["frobenius", "log_det"] = "frobenius",
    num_steps: int = 10_000,
    learning_rate: Any = None,
    tolerance: Any = None,
    column_axis: int = -1,
    batch_axes: int = 0,
) -> Array:
    r"""Change the values of a masked kernel so that it is close to an isometry.

    The kernel is read as a matrix :math:`s V` of scale :math:`s`, and :math:`G` is the Gram matrix
    of the smaller side of :math:`V`: :math:`G = V V^\top` if it has no more rows than columns.
    Descent starts from the kernel's values on the mask; it is deterministic.

    ``"frobenius"`` is the method as published: plain gradient descent on
    :math:`\lVert s^2 G - s^2 I \rVert_F`, the norm not squared. For two reasons it does not reach
    isometry. First, the gradient with respect to a singular value :math:`\sigma` vanishes with
    :math:`\sigma`, so below a density of about 0.2 a few singular values end at 0 although the mask
    does not require it. Second, the gradient of a norm does not shrink near the minimum, so the
    steps end at a norm of a few times the learning rate, not at 0. Where the norm is exactly 0 its
    gradient is taken as 0.

    ``"log_det"`` minimizes, with an :math:`\varepsilon` that grows from 1e-10 to 1e-4,

    .. math:: \operatorname{tr} G - (1 + \varepsilon) \log\det(G + \varepsilon I)
              = \sum_i \sigma_i^2 - (1 + \varepsilon) \log(\sigma_i^2 + \varepsilon)

    by Adam, from the best multiple of the start. Each term is smallest at :math:`\sigma_i = 1`
    for every :math:`\varepsilon`, and its gradient with respect to a small singular value grows as
    :math:`1 / \sigma_i`. So if the mask has full structural rank, the global minimum is exact
    isometry. The problem is not convex; that descent reaches the minimum is observed, not proved.
    It fails where the kernel is singular at the start (a row of zeros stays zero) or nearly
    singular, which happens at two or three weights in each row. Otherwise all singular values end
    near 1. The last digits converge quickly where the isometries on the mask are isolated or
    plentiful, and slowly in between. Below full structural rank only as many singular values as
    necessary stay 0, the others end near 1, and the descent takes all of ``num_steps``.

    In a loss summed over layers, the gradient of each layer is that of its own term. So descent on
    the loss of a network is the same as calling this function for each kernel.

    Args:
        kernel: Floating array of at least 2 axes besides the batch axes: the values to start
            from. Values outside the mask are ignored. They must not be all zero, since descent
            cannot leave zero.
        mask: Boolean array of the kernel's shape, True where a weight may be non-zero.
        scale: ``s > 0``, the target of the singular values.
        objective: ``"frobenius"`` or ``"log_det"``.
        num_steps: Number of steps, or the largest number with ``"log_det"``; at least 1. Nowak et
            al. take 10 000, and 1000 for networks of a thousand layers; ``"log_det"`` often stops
            within a few hundred.
        learning_rate: A positive number that does not depend on the scale. For ``"frobenius"``
            the step in units of the gradient with respect to the kernel, 0.1 by default. For
            ``"log_det"`` the first step of a weight in units of the root mean square weight of an
            isometry on the mask, 0.05 by default; it falls with the square root of the error
            below, and linearly to 0 at ``num_steps``.
        tolerance: Only for ``"log_det"``: stop as soon as :math:`\max_{ij} |G - I|_{ij}` is no
            larger than this, a positive number. By default 1e-5. Each layer of a stack stops
            independently.
        column_axis: The axis of the kernel, counted with the batch axes, that holds the columns;
            all others but the batch axes together are the rows. A convolution of Flax becomes
            (k·k·c_in) × c_out, as published: this matrix comes close to isometry, and **not** the
            convolution, which has other singular values.
        batch_axes: How many leading axes stack layers. Each layer is a separate problem.

    Returns:
        An array of the kernel's shape and dtype, exactly 0 outside the mask. It is computed in
        float32, or float64 for a float64 kernel, and cast last. Inside :func:`jax.jit` a layer
        whose descent diverges is NaN on the mask.

    Raises:
        ValueError: If an argument is out of range, if the mask does not fit the kernel, if the
            kernel has values that are not finite, or for a tolerance with ``"frobenius"``.
        FloatingPointError: Outside of :func:`jax.jit`, if the descent of a layer diverges: its
            error at the end is at least twice that of the start, plus what the size of the steps
            explains.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import isometry
        >>> key = jax.random.key(0)
        >>> mask = jnp.tri(8, dtype=bool)
        >>> start = jax.random.normal(key, (8, 8)) / 8**0.5
        >>> kernel = isometry.approximate_isometry(start, mask, objective="log_det")
        >>> bool(jnp.allclose(jnp.linalg.svd(kernel, compute_uv=False), 1.0, atol=1e-4))
        True

    Reference:
        Lee, Ajanthan, Gould and Torr, "A Signal Propagation Perspective for Pruning Neural Networks
        at Initialization", ICLR 2020; the steps are those of Nowak et al., "Sparser, Better,
        Deeper, Stronger", ICML 2024.
    """
    kernel = checks.array(kernel, "kernel")
    checks.float_dtype(kernel.dtype, "kernel.dtype")
    batch_axes, column_axis = _matrix_axes(kernel.shape, batch_axes, column_axis, "kernel.shape")
    mask = _kernel_mask(mask, kernel.shape)
    _finite_values(kernel)
    scale = checks.scale(scale, kernel.dtype, interval="(0, inf)")
    remedy = "Use 'log_det' where exact isometry matters, 'frobenius' to reproduce the paper."
    checks.one_of(objective, tuple(_OBJECTIVES), name="objective", remedy=remedy)
    descend, default_rate = _OBJECTIVES[objective]
    # Steps are counted by 32-bit integers.
    num_steps = checks.integer(num_steps, low=1, high=2**31 - 1, name="num_steps")
    if tolerance is not None and objective == "frobenius":
        raise checks.value_error(
            "tolerance",
            tolerance,
            "has no meaning for objective='frobenius', which takes all of num_steps",
            "Leave it out, or stop early with objective='log_det'.",
        )
    learning_rate = default_rate if learning_rate is None else learning_rate
    learning_rate = checks.number(learning_rate, "learning_rate", interval="(0, inf)")
    tolerance = 1e-5 if tolerance is None else tolerance
    tolerance = checks.number(tolerance, "tolerance", interval="(0, inf)")
    if kernel.size == 0:
        return kernel

    dtype = checks.compute_dtype(kernel.dtype)
    options = _Options(
        jnp.asarray(scale, dtype),
        jnp.asarray(learning_rate, dtype),
        jnp.asarray(tolerance, dtype),
        jnp.asarray(num_steps, jnp.int32),
    )
    values, before, after = _solve(
        kernel, mask, options, descend=descend, batch_axes=batch_axes, column_axis=column_axis
    )
    if not checks.is_traced(values):
        _converged(before, after, scale, learning_rate)
    return values


def structural_rank(mask: Any, *, column_axis: int = -1, batch_axes: int = 0) -> Any:
    """Return the largest rank that any values on a mask can have.

    This is the largest number of unmasked entries such that no two share a row or a column (a
    maximum matching of rows with columns). Almost all values on the mask have this rank.

    Args:
        mask: Boolean array of at least 2 axes besides the batch axes. It is read on the host.
        column_axis: The axis, counted with the batch axes, that holds the columns; all others but
            the batch axes together are the rows.
        batch_axes: How many leading axes stack layers.

    Returns:
        An int; with batch axes a NumPy array of ints of their shape.

    Raises:
        ValueError: If the mask is not boolean, is being traced, or an axis is out of range.

    Example:
        >>> import numpy as np
        >>> from eoi_jax import isometry
        >>> isometry.structural_rank(np.array([[True, True, True], [True, False, False]]))
        2
        >>> isometry.structural_rank(np.array([[False, True], [False, True]]))
        1

    Reference:
        Pothen and Fan, "Computing the block triangular form of a sparse matrix", ACM Transactions
        on Mathematical Software 16 (1990).
    """
    _kernel_mask(mask)
    if checks.is_traced(mask):
        raise checks.value_error(
            "mask", mask, "is outside the arrays with known values", "Call it outside of jax.jit."
        )
    mask = np.asarray(mask)
    batch_axes, column_axis = _matrix_axes(mask.shape, batch_axes, column_axis, "mask.shape")
    rows = np.moveaxis(mask, column_axis, -1)
    stack = mask.shape[:batch_axes]
    rows = rows.reshape(math.prod(stack), math.prod(rows.shape[batch_axes:-1]), rows.shape[-1])
    ranks = [int(csgraph.structural_rank(csr_matrix(layer))) for layer in rows]
    return np.array(ranks, np.int64).reshape(stack) if batch_axes else ranks[0]


def _kernel_mask(mask: Any, shape: tuple[int, ...] | None = None) -> Array:
    """Accept a boolean array, of the kernel's shape if that is given."""
    mask = checks.array(mask, "mask")
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {mask.dtype}, but a mask is boolean. Convert it with `kernel != 0`."
        )
    if shape is not None and mask.shape != shape:
        raise ValueError(
            f"mask has shape {mask.shape}, but the kernel has {shape}. "
            "Use the shape of the kernel; a mask of all True keeps every weight."
        )
    return mask


def _converged(before: Array, after: Array, scale: Any, learning_rate: Any) -> None:
    """Require of each layer errors that are finite, as those of a diverging one are not."""
    starts, ends = np.ravel(np.asarray(before)), np.ravel(np.asarray(after))
    if not np.isfinite(starts).all():
        raise checks.value_error(
            "scale",
            scale,
            f"is outside the scales for this kernel, whose squares leave {starts.dtype} beside it",
            "Start from a kernel of about that scale.",
        )
    bad = np.flatnonzero(~np.isfinite(ends))
    if bad.size:
        raise FloatingPointError(
            f"learning_rate={learning_rate!r} lets the descent diverge for {bad.size} of "
            f"{ends.size} layers, whose errors grow from {starts[bad[0]]:.3g} on. "
            "Give a smaller one; the default is 0.1 for 'frobenius' and 0.05 for 'log_det'."
        )


def _finite_values(kernel: Array) -> None:
    """Require that no value is infinite or NaN."""
    if checks.is_traced(kernel):
        return
    with jax.ensure_compile_time_eval():  # a constant is no tracer, but its sum would be
        bad = int(jnp.sum(~jnp.isfinite(kernel)))
    if bad:
        raise ValueError(
            f"kernel has {bad} of {kernel.size} entries outside the finite numbers. "
            "Find where they become infinite or NaN, or draw the values anew."
        )


def _matrix_axes(
    shape: tuple[int, ...], batch_axes: int, column_axis: int, name: str
) -> tuple[int, int]:
    """Check how a shape is read as a stack of matrices."""
    batch_axes = checks.integer(batch_axes, low=0, name="batch_axes")
    checks.shape(shape, min_ndim=batch_axes + 2, name=name)
    axis = checks.axis(column_axis, len(shape), "column_axis")
    remedy = "The batch axes come first: give one of the other axes."
    return batch_axes, checks.integer(
        axis, low=batch_axes, high=len(shape) - 1, name="column_axis", remedy=remedy
    )


class _Options(NamedTuple):
    """The numbers of a descent, which a compiled program takes as arguments."""

    scale: Array
    learning_rate: Array
    tolerance: Array
    num_steps: Array


@partial(jax.jit, static_argnames=("descend", "batch_axes", "column_axis"))
def _solve(
    kernel: Array,
    mask: Array,
    options: _Options,
    *,
    descend: Callable[[Array, Array, _Options], Array],
    batch_axes: int,
    column_axis: int,
) -> tuple[Array, Array, Array]:
    """Descend for each layer of a kernel, as matrices of no more rows than columns.

    Returns the values, and the errors of each layer before and after; a layer that diverges has
    NaN for its values and for the latter.
    """
    columns = kernel.shape[column_axis]
    is_tall = kernel.size // columns > columns * math.prod(kernel.shape[:batch_axes])

    def as_rows(array: Array) -> Array:
        array = jnp.moveaxis(array, column_axis, -1)
        array = array.reshape(math.prod(array.shape[:batch_axes]), -1, columns)
        return jnp.swapaxes(array, 1, 2) if is_tall else array

    zero = jnp.zeros((), kernel.dtype)
    # Both objectives move V = W / s in the same way for every s.
    start = jnp.where(mask, kernel, zero).astype(options.scale.dtype) / options.scale

    def layer(matrix: Array, mask: Array) -> tuple[Array, Array, Array]:
        before = jnp.linalg.norm(_gram_error(matrix))
        # A start may be better than its best multiple, from which log_det descends, or worse.
        scaled = jnp.linalg.norm(_gram_error(_best_multiple(matrix)))
        end = descend(matrix, mask, options)
        after = jnp.linalg.norm(_gram_error(end))
        rate = options.learning_rate
        # Steps of the gradient of a norm end at a norm of their own size.
        noise = 4 * rate * (1 + rate) if descend is _frobenius else options.tolerance * len(matrix)
        is_good = jnp.isfinite(before) & (after <= 2 * jnp.maximum(before, scaled) + noise)
        return jnp.where(is_good, end, jnp.nan), before, jnp.where(is_good, after, jnp.nan)

    rows, before, after = jax.vmap(layer)(as_rows(start), as_rows(mask))
    matrix = jnp.swapaxes(rows, 1, 2) if is_tall else rows
    moved_shape = jnp.moveaxis(kernel, column_axis, -1).shape
    values = jnp.moveaxis(matrix.reshape(moved_shape), -1, column_axis) * options.scale
    values = jnp.where(mask, values, jnp.zeros((), values.dtype)).astype(kernel.dtype)
    return values, before, after


def _gram_error(matrix: Array) -> Array:
    """Return ``V Vᵀ − I``."""
    gram = jnp.matmul(matrix, matrix.T, precision=jax.lax.Precision.HIGHEST)
    return gram - jnp.eye(len(matrix), dtype=matrix.dtype)


def _best_multiple(matrix: Array) -> Array:
    """Return the multiple of ``V`` with the trace of ``I``."""
    squared = jnp.sum(matrix * matrix)
    is_zero = squared == 0
    return matrix * jnp.where(is_zero, 1, jnp.sqrt(len(matrix) / jnp.where(is_zero, 1, squared)))


def _frobenius(matrix: Array, mask: Array, options: _Options) -> Array:
    """Take plain gradient steps on ``‖V Vᵀ − I‖_F``."""

    def step(_: Any, matrix: Array) -> Array:
        error = _gram_error(matrix)
        squared = jnp.sum(error * error)
        is_zero = squared == 0
        norm = jnp.sqrt(jnp.where(is_zero, jnp.ones_like(squared), squared))
        gradient = 2 * jnp.matmul(error / norm, matrix, precision=jax.lax.Precision.HIGHEST)
        masked = jnp.where(mask, gradient, jnp.zeros_like(gradient))
        return matrix - options.learning_rate * masked

    return jax.lax.fori_loop(0, options.num_steps, step, matrix)


class _LogDetState(NamedTuple):
    """What a descent on the log-determinant carries from step to step."""

    taken: Array  # steps
    matrix: Array
    mean: Array  # of the gradients, decaying
    square: Array  # mean of their squares, decaying
    error: Array  # the largest entry of V Vᵀ − I


def _log_det(matrix: Array, mask: Array, options: _Options) -> Array:
    """Take Adam's steps on ``tr G − (1 + ε) log det(G + ε I)`` until G is I."""
    size, dtype = len(matrix), matrix.dtype
    identity = jnp.eye(size, dtype=dtype)
    num_weights = jnp.maximum(jnp.sum(mask, dtype=dtype), 1)
    rate = options.learning_rate * jnp.sqrt(size / num_weights)
    matrix = _best_multiple(matrix)
    # Adam's usual memory of 1000 squared gradients would keep the first, largest ones throughout.
    decay = jnp.asarray(0.9, dtype)

    def is_unfinished(state: _LogDetState) -> Array:
        return (state.taken < options.num_steps) & (state.error > options.tolerance)

    def step(state: _LogDetState) -> _LogDetState:
        taken, matrix, mean, square, error = state
        done = taken.astype(dtype) / options.num_steps.astype(dtype)
        floor = _FIRST_FLOOR * (_LAST_FLOOR / _FIRST_FLOOR) ** done
        # QR of [Vᵀ; √ε I] gives the Cholesky factor of G + ε I without squaring V, which would
        # lose singular values below 3e-4 in float32, and never fails.
        factor = jnp.linalg.qr(jnp.concatenate([matrix.T, floor * identity]), mode="r")
        inverse_times_matrix = jax.scipy.linalg.cho_solve((factor, False), matrix)
        gradient = 2 * (matrix - (1 + floor**2) * inverse_times_matrix)
        gradient = jnp.where(mask, gradient, jnp.zeros_like(gradient))

        mean = decay * mean + (1 - decay) * gradient
        square = decay * square + (1 - decay) * gradient**2
        unbias = 1 / (1 - decay ** (taken + 1).astype(dtype))
        update = unbias * mean / (jnp.sqrt(unbias * square) + 1e-8)
        matrix = matrix - rate * jnp.sqrt(jnp.minimum(error, 1)) * (1 - done) * update
        return _LogDetState(taken + 1, matrix, mean, square, jnp.max(jnp.abs(_gram_error(matrix))))

    zeros = jnp.zeros_like(matrix)
    error = jnp.max(jnp.abs(_gram_error(matrix)))
    start = _LogDetState(jnp.int32(0), matrix, zeros, zeros, error)
    return jax.lax.while_loop(is_unfinished, step, start).matrix


# How an objective descends, and its learning rate by default.
_OBJECTIVES = {"frobenius": (_frobenius, 0.1), "log_det": (_log_det, 0.05)}
