"""One sparse matrix that is exactly orthogonal, at a given density: EOI.

Below is the algorithm in plain NumPy, for a square matrix. :func:`orthogonal` makes the same matrix
from the same rotations. It is faster, since it applies commuting rotations at once, and counts
non-zeros before it multiplies.

>>> import jax
>>> import numpy as np
>>> import eoi_jax as eoi
>>> def plain(key, size, density):
...     rotations = eoi.givens.sample(key, size, num_rotations=20 * size)
...     w, target = np.eye(size), density * size**2
...     for i, j, theta in zip(*map(np.asarray, rotations)):
...         before, cos, sin = w.copy(), np.cos(theta), np.sin(theta)
...         w[i] = cos * before[i] + sin * before[j]
...         w[j] = -sin * before[i] + cos * before[j]
...         if np.count_nonzero(w) >= target:
...             short, over = target - np.count_nonzero(before), np.count_nonzero(w) - target
...             return w if over <= short else before
>>> key = jax.random.key(0)
>>> bool(np.allclose(plain(key, 32, 0.2), eoi.orthogonal(key, (32, 32), 0.2), atol=1e-5))
True
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from eoi_jax import givens, theory
from eoi_jax._internal import checks, drawing, selection, shardings
from eoi_jax._internal.keys import threefry_key
from eoi_jax.givens import AngleLaw
from eoi_jax.planes import PlaneLaw, check, independent
from eoi_jax.typing import Array, DType, Shape

__all__ = ["orthogonal"]


def orthogonal(
    key: Array,
    shape: Shape,
    density: float | Array,
    *,
    scale: float | Array = 1.0,
    dtype: DType = jnp.float32,
    column_axis: int = -1,
    angles: AngleLaw = givens.uniform_angle,
    permute: bool = False,
    stopping: Literal["closest", "at_most"] = "closest",
    planes: PlaneLaw = independent,
    balance_outputs: bool | Array = False,
) -> Array:
    r"""Draw a sparse, exactly orthogonal matrix: Exact Orthogonal Initialization (EOI).

    With :math:`N = \max(n, m)`, independent random Givens rotations over the :math:`N` coordinates
    of the larger side are applied to the partial identity :math:`[I \mid 0]`. The sequence stops
    at the number of rotations whose density is closest to the target: the rotation that reaches
    the target is kept unless the density before it is closer. Every rotation is orthogonal, so

    .. math:: W W^\top = \text{scale}^2 I \quad (n \le m), \qquad
              W^\top W = \text{scale}^2 I \quad (n \ge m),

    up to rounding. A rotation adds at most one non-zero to each vector of the smaller side, so
    the density ends within :math:`1/(2N)` of the target. With ``stopping="at_most"`` the sequence
    stops before the first rotation that would exceed the target, and the density ends at most
    :math:`1/N` below it.

    With more columns than rows, as in a layer with more outputs than inputs, the squared norms of
    the columns have the mean :math:`n/m`. At low density some columns are zero or nearly zero. If
    a normalization follows, the gradient of such an output is too large by the inverse of its
    norm. With ``balance_outputs`` every column has a norm of at least
    :math:`\tfrac12 \sqrt{n/m}` times ``scale``. The start is then the identity repeated side
    by side, with a sign for each copy and its rows scaled to norm 1. Where an angle would leave a
    norm below this bound, it is mapped into the range of angles that do not (for a uniform law,
    uniformly). The matrix is as exactly orthogonal, and the same rule stops the rotations.

    One key makes one matrix, whether the call is eager, jitted or vmapped. The density may be
    traced: another density compiles nothing new under :func:`jax.jit`.

    Args:
        key: A PRNG key.
        shape: The shape; as in :func:`jax.nn.initializers.orthogonal`, ``column_axis`` gives the
            :math:`m` columns and all other axes together the :math:`n` rows.
        density: Fraction of non-zeros, in [1/max(n, m), 1], in a matrix of :math:`2^{31}` entries
            or more so small that the non-zeros are fewer than :math:`2^{31} - \min(n, m)`. A traced
            value outside this range gives NaN.
        scale: Factor of the result: the singular values are all ``scale``.
        dtype: Real floating dtype of the result. The matrix is computed in this dtype, or, if it is
            narrower than float32, in float32 and cast last. The density is that before the cast
            (float16 rounds the smallest entries to zero).
        column_axis: The axis that holds the columns.
        angles: Law of the angles, a constant in radians or ``(key, dtype) -> scalar``; default
            :math:`U(0, 2\pi)`. For any other law non-zeros are counted on the floats, since equal
            angles cancel entries to exact zeros.
        permute: Permute rows and columns at random and draw their signs. This keeps orthogonality
            and density, and makes the support independent of the diagonal. The paper does not
            permute.
        stopping: ``"closest"``, the paper's rule, may end above the target. ``"at_most"`` never
            exceeds the count of :func:`eoi_jax.masks.fill`, the target count rounded half up, so
            that further weights can be unmasked up to exactly this count (a traced density is
            multiplied in float32, or wider if it is).
        planes: Law of the planes: :data:`eoi_jax.planes.independent`, the paper's;
            :data:`eoi_jax.planes.matching`, which gives all rows and columns about equally many
            non-zeros; or :func:`eoi_jax.planes.within` a pattern, which may bound the density.
        balance_outputs: Whether to make sure that no column is zero or much smaller than others.
            For :math:`n < m` it takes a density of :math:`1/n` or more. For :math:`n \ge m` it
            changes nothing, since all columns have norm ``scale``. May be traced. Not possible with
            planes in a pattern.

    Returns:
        An array of ``shape`` and ``dtype``; empty if ``shape`` holds a zero.

    Raises:
        ValueError: For a density outside its range, above that of ``planes`` or below what
            ``balance_outputs`` takes; for fewer than two axes, a dtype that is not real floating,
            a ``scale`` that ``dtype`` cannot hold, or an unknown ``stopping``;
            for ``planes`` that are no law of planes, a law of another size, or a pattern together
            with ``balance_outputs``; for an angle that is a multiple of π/2 (its rotations only
            permute, so no density above the minimum is reached).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> w = eoi.orthogonal(jax.random.key(0), (64, 100), density=0.1)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(64), atol=1e-5))
        True
        >>> abs(float((w != 0).mean()) - 0.1) <= 0.5 / 100
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.1.
    """
    key = threefry_key(key)
    shape = checks.shape(shape)
    dtype = checks.float_dtype(dtype)
    column_axis = checks.axis(column_axis, len(shape), "column_axis")
    scale = checks.scale(scale, dtype)
    angles = drawing.check_angles(angles)
    check(planes)
    balance_outputs = checks.balance(balance_outputs, planes)
    checks.one_of(
        stopping,
        ("closest", "at_most"),
        name="stopping",
        remedy="Use the paper's 'closest', or 'at_most' to keep to a budget.",
    )
    columns = shape[column_axis]
    rows = math.prod(shape) // columns if columns else 0
    if rows == 0:
        checks.density(density)
        return jnp.zeros(shape, dtype)
    size = max(rows, columns)
    if size >= 2**31:
        problem = "has a side of the matrix outside [1, 2**31)"
        raise checks.value_error("shape", shape, problem, "Split the layer.")
    balanced = None
    if balance_outputs is not False and rows < columns:
        balanced = jnp.asarray(balance_outputs)
    minimum = 1 / size
    why = (
        f"An orthogonal {rows} x {columns} matrix has at least one non-zero in each vector "
        "of its smaller side."
    )
    if balanced is not None and not checks.is_traced(balanced):
        minimum = 1 / rows
        why = (
            f"With balance_outputs=True each of the {columns} columns has a non-zero: raise the "
            "density, or leave balance_outputs out."
        )
    density = checks.density(density, minimum=minimum, why=why)
    planes = planes.of_size(size)
    tall = (size, min(rows, columns))
    checks.reachable(density, planes.max_nonzeros(*tall), (rows, columns))
    countable = drawing.countable_nonzeros(*tall)
    if not checks.is_traced(density) and density > countable / (rows * columns):
        problem = f"is outside [{minimum:.6g}, {countable / (rows * columns):.6g}]"
        remedy = "A matrix has fewer than 2**31 non-zeros: lower the density, or split the layer."
        raise checks.value_error("density", density, problem, remedy)
    at_most = stopping == "at_most"
    if at_most and not checks.is_traced(density):
        # The integer that masks.fill has: float32 may round to the one above.
        count = selection.target_count(density, rows * columns)
        least = round(minimum * rows * columns)
        target = jnp.asarray(max(int(count), least), jnp.int32)
    else:
        target = jax.lax.stop_gradient(jnp.asarray(density, jnp.result_type(float)))
    compute_dtype = checks.compute_dtype(dtype)
    # A loop of unknown length has no reverse mode, so a scale that may be differentiated stays out.
    # The squares of a factor, which norms are compared with, may leave the range of its dtype.
    is_apart = checks.is_traced(scale) or balanced is not None
    factor = jnp.asarray(scale, compute_dtype) if is_apart else None
    inside = jnp.asarray(scale if factor is None else 1.0, compute_dtype)
    segment, rounds = _lengths(tall, density, planes)
    axes = shardings.axes_of_columns(key, is_transposed=rows < columns)
    law = drawing.Law(tall, segment, angles, at_most, bool(permute), planes, rounds, axes)
    matrix = drawing.draw(key, target, inside, law, balanced)
    drawing.check_reached(matrix, density, planes)
    if factor is not None:
        matrix = matrix * factor
    matrix = (matrix if rows >= columns else matrix.T).astype(dtype)
    rest = shape[:column_axis] + shape[column_axis + 1 :]
    return jnp.moveaxis(matrix.reshape(*rest, columns), -1, column_axis)


@functools.lru_cache(maxsize=4096)
def _expected_rotations(size: int, density: float, planes: PlaneLaw) -> int:
    return theory.num_rotations(size, density, method="closed_form", planes=planes)


def _lengths(shape: tuple[int, int], density: Any, planes: PlaneLaw) -> tuple[int, int]:
    """Choose the rotations of a segment, and the rounds of matchings applied before the first.

    It changes the speed and not the matrix. A segment has 1 to 4 rotations per coordinate, so that
    few programs are compiled, and fewer than 4 in matrices of more than 16384 coordinates, since
    each rotation takes half a kilobyte of a TPU. A static density gets one segment that nearly
    always suffices; for a traced one the four rotations per coordinate reach a density of about
    0.4. How many rotations a pattern takes has no theory.
    """
    size = shape[0]
    unit = max(size, 32)
    most = min(max(2**16 // unit, 1), 4)
    needed = None
    if planes.size is not None:
        segment = min(2, most) * unit
    elif checks.is_traced(density):
        segment = most * unit
    else:
        needed = _expected_rotations(size, float(density), planes)
        needed += size // 4 if needed else 0
    rounds = drawing.rounds_at_once(shape, planes, needed)
    if needed is not None:
        left = max(needed - rounds * (size // 2), 1)
        segment = min(-(-left // unit), most) * unit
    return min(segment, drawing.MAX_SEGMENT), rounds
