"""One sparse matrix that is exactly orthogonal, at a given density."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from eoi_jax import givens, rotation, theory
from eoi_jax._internal import checks, selection
from eoi_jax._internal.vmap import map_on_cpu, varying_as
from eoi_jax.givens import AngleLaw
from eoi_jax.typing import Array, DType, Shape

__all__ = ["orthogonal"]

# A sequence is given up after this many rotations per coordinate. Every row of a 4096 x 4096
# matrix is full after about 9 and the chance that one is not after 64 is below 1e-45, so only an
# angle law that undoes its own work gets here (and then returns NaN).
_LIMIT = 64
# Longer segments would have more touched coordinates than an index can count.
_MAX_SEGMENT = 2**24


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
) -> Array:
    r"""Draw a sparse, exactly orthogonal matrix: Exact Orthogonal Initialization (EOI).

    With :math:`N = \max(n, m)`, independent random Givens rotations over the :math:`N` coordinates
    of the larger side are applied to the partial identity :math:`[I \mid 0]`. They stop at the
    count whose density is closest to the target: the rotation that reaches it is kept if it ends
    nearer than the one before. Every rotation is orthogonal, so

    .. math:: W W^\top = \text{scale}^2 I \quad (n \le m), \qquad
              W^\top W = \text{scale}^2 I \quad (n \ge m),

    up to rounding, and a rotation adds at most one non-zero to each vector of the smaller side, so
    the density ends within :math:`1/(2N)` of the target. With ``stopping="at_most"`` they stop
    before the first rotation that would exceed the target instead, and the density ends at most
    :math:`1/N` below it.

    One key makes one matrix, whether the call is eager, jitted or vmapped. The density may be
    traced: nothing is compiled anew for another density under :func:`jax.jit`.

    Args:
        key: a PRNG key.
        shape: the shape; as in :func:`jax.nn.initializers.orthogonal`, ``column_axis`` gives the
            :math:`m` columns and all other axes together the :math:`n` rows. At most ``2**31 - 1``
            elements.
        density: fraction of non-zeros, in [1/max(n, m), 1]. A traced value outside gives NaN.
        scale: factor of the result: the singular values are all ``scale``.
        dtype: real floating dtype of the result. float32 or wider is computed in itself, a narrower
            dtype in float32 and cast last; the density is that before the cast (float16 rounds the
            smallest entries to zero).
        column_axis: the axis that holds the columns.
        angles: law of the angles, a constant in radians or ``(key, dtype) -> scalar``; default
            :math:`U(0, 2\pi)`. For any other law non-zeros are counted on the floats, since equal
            angles cancel entries to exact zeros.
        permute: permute rows and columns at random and draw their signs, which keeps orthogonality
            and density and unties the support from the diagonal. The paper does not.
        stopping: ``"closest"``, the paper's rule, may end above the target; ``"at_most"`` keeps to
            the budget of :func:`eoi_jax.masks.fill`, the target count rounded half up, so that
            further weights can be unmasked up to it exactly (a traced density is multiplied in
            its own precision).

    Returns:
        An array of ``shape`` and ``dtype``; empty if ``shape`` holds a zero.

    Raises:
        ValueError: for a density outside its range, fewer than two axes, a dtype that is not real
            floating, too many elements, a ``scale`` that is not finite, a ``stopping`` of another
            name, or an angle that is a multiple of π/2 (its rotations only permute, so no density
            beyond the minimum is reached).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> w = eoi.orthogonal(jax.random.key(0), (64, 100), density=0.1)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(64), atol=1e-5))
        True
        >>> abs(float((w != 0).mean()) - 0.1) <= 0.5 / 100
        True

    Reference:
        Nowak et al., *Sparser, Better, Deeper, Stronger* (ICML 2024), section 4.1.
    """
    shape = checks.shape(shape)
    dtype = checks.float_dtype(dtype)
    column_axis = checks.axis(column_axis, len(shape), "column_axis")
    scale = checks.finite_scalar(scale, "scale")
    angles = check_angles(angles)
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
    if rows * columns >= 2**31:
        raise checks.value_error(
            "shape", shape, "is outside the shapes of fewer than 2**31 elements", "Split the layer."
        )
    size = max(rows, columns)
    density = checks.density(
        density,
        minimum=1 / size,
        why=f"An orthogonal {rows} x {columns} matrix has at least one non-zero in each vector "
        "of its smaller side.",
    )
    at_most = stopping == "at_most"
    if at_most and not checks.is_traced(density):
        # The integer that masks.fill has: float32 may round to the one above.
        budget = selection.budget(density, rows * columns)
        target = jnp.asarray(max(int(budget), min(rows, columns)), jnp.int32)
    else:
        target = jax.lax.stop_gradient(jnp.asarray(density, jnp.result_type(float)))
    matrix = _matrix(
        key,
        (rows, columns),
        target,
        scale=scale,
        dtype=dtype,
        segment=_segment_length(size, density),
        angles=angles,
        permute=permute,
        at_most=at_most,
    )
    rest = shape[:column_axis] + shape[column_axis + 1 :]
    return jnp.moveaxis(matrix.reshape(*rest, columns), -1, column_axis)


@functools.partial(jax.jit, static_argnames=("padded", "dtype", "angles"))
def draw_padded(
    keys: Array,
    budgets: Array,
    sizes: Array,
    columns: Array,
    *,
    padded: tuple[int, int],
    dtype: DType,
    angles: AngleLaw,
) -> Array:
    """Draw the matrices of :func:`orthogonal` with ``stopping="at_most"`` for counts of non-zeros.

    All arguments but the static ones have one entry for each matrix, which is ``(size, columns)``,
    tall or square, in the corner of zeros of the shape ``padded``. So one program, whose
    compilation takes far longer than its run, draws matrices of many shapes. ``budgets`` are
    integers of at least ``columns``; ``dtype`` is float32 or wider.
    """
    segment = 2 * max(padded[0], 32)  # the same for all densities

    def draw(key: Array, budget: Array, size: Array, columns: Array) -> Array:
        scale = jnp.ones((), dtype)
        return _corner(key, budget, scale, size, columns, padded, segment, angles, True)

    return jax.vmap(map_on_cpu(draw))(keys, budgets, sizes, columns)


def _matrix(
    key: Array,
    shape: tuple[int, int],
    target: Array,
    *,
    scale: Any,
    dtype: DType,
    segment: int,
    angles: AngleLaw,
    permute: bool,
    at_most: bool,
) -> Array:
    """Draw a matrix of ``shape`` and cast it last."""
    rows, columns = shape
    wide = checks.compute_dtype(dtype)
    # A loop of unknown length has no reverse mode, so a scale that may be differentiated stays out.
    differentiable = checks.is_traced(scale)
    matrix = _draw(
        key,
        target,
        jnp.asarray(1.0 if differentiable else scale, wide),
        size=max(rows, columns),
        columns=min(rows, columns),
        segment=segment,
        angles=angles,
        permute=bool(permute),
        at_most=at_most,
    )
    if differentiable:
        matrix = matrix * jnp.asarray(scale, wide)
    return (matrix if rows >= columns else matrix.T).astype(dtype)


@functools.partial(
    jax.jit, static_argnames=("size", "columns", "segment", "angles", "permute", "at_most")
)
def _draw(
    key: Array,
    target: Array,
    scale: Array,
    *,
    size: int,
    columns: int,
    segment: int,
    angles: AngleLaw,
    permute: bool,
    at_most: bool,
) -> Array:
    """Draw the ``(size, columns)`` matrix, tall or square, for a density or a count."""

    def draw(key: Array, target: Array, scale: Array) -> Array:
        shape = (size, columns)
        matrix = _corner(key, target, scale, size, columns, shape, segment, angles, at_most)
        return permuted(key, matrix) if permute else matrix

    return map_on_cpu(draw)(key, target, scale)


def _corner(
    key: Array,
    target: Array,
    scale: Array,
    size: int | Array,
    columns: int | Array,
    shape: tuple[int, int],
    segment: int,
    angles: AngleLaw,
    at_most: bool,
) -> Array:
    """Draw a ``(size, columns)`` matrix, tall or square, in the corner of zeros of ``shape``.

    ``size`` and ``columns`` may be traced, and change no value of the matrix by being so.
    """
    twice_target, valid = _twice_target(target, size, columns, at_most)
    matrix = _eye(shape, columns, jnp.where(valid, scale, jnp.nan))
    if shape[0] == 1:
        return matrix
    return _rotate_to_density(key, matrix, size, columns, twice_target, segment, angles, at_most)


def _twice_target(
    target: Array, size: int | Array, columns: int | Array, at_most: bool
) -> tuple[Array, Array]:
    """Double the count that a target asks for, and tell whether a matrix can have it.

    Counts are compared doubled, so that the middle between two counts is an integer as well.
    """
    total = size * columns
    if jnp.issubdtype(target.dtype, jnp.integer):
        valid = (target >= columns) & (target <= total)
        return 2 * jnp.clip(target, columns, total).astype(jnp.uint32), valid
    valid = (target >= (1 - 1e-6) / size) & (target <= 1)
    density = jnp.where(valid, jnp.clip(target, 1 / size, 1), 1 / size)
    if at_most:
        return 2 * jnp.floor(total * density + 0.5).astype(jnp.uint32), valid
    # The slack takes back what rounding a density such as 0.3 to float32 may have added.
    slack = 2 * jnp.finfo(density.dtype).eps
    return jnp.ceil(2.0 * total * density * (1 - slack)).astype(jnp.uint32), valid


def _rotate_to_density(
    key: Array,
    matrix: Array,
    size: int | Array,
    columns: int | Array,
    twice_target: Array,
    segment: int,
    angles: AngleLaw,
    at_most: bool,
) -> Array:
    """Rotate the partial identity until its count is closest to the target, or below it.

    Rotations come in segments of a static length, each with waves of its own; how long a segment
    is changes the speed and not the result. The non-zeros of every prefix are counted first, on
    integers, and only the rotations that are kept touch the floats.
    """
    rows = matrix.shape[0]
    continuous = angles is givens.uniform_angle
    total = jnp.asarray(size * columns, jnp.uint32)
    limit = min(_LIMIT * rows, 2**31 - 1 - segment)
    State = tuple[Array, Array, Array, Array]

    def unfinished(state: State) -> Array:
        first, nonzeros, _, _ = state
        return (2 * nonzeros < twice_target) & (first < limit)

    def extend(state: State) -> State:
        first, nonzeros, packed, matrix = state
        rotations = givens.sample(
            key, size, segment, angles=angles, dtype=matrix.dtype, first=first
        )
        wave = givens.waves(rotations, rows)
        if continuous:
            packed, gained = givens.grow_support(packed, rotations, wave)
        else:
            _, change = rotation.count_gained(matrix, rotations, wave)
            gained = change.astype(jnp.uint32)  # wraps, and wraps back in the sum
        counts = nonzeros + jnp.cumsum(gained, dtype=jnp.uint32)
        reached = 2 * counts >= twice_target
        crossing = jnp.argmax(reached)
        # Kept if its own count fits, or else if it is nearer than the count before it.
        other = counts[crossing] if at_most else counts[crossing] - gained[crossing]
        fits = counts[crossing] + other < twice_target + jnp.uint32(at_most)
        keep = jnp.where(fits, crossing + 1, crossing)
        count = jnp.where(reached.any(), keep, segment).astype(jnp.int32)
        matrix = rotation.rotate_rows(
            matrix, rotations, wave, count=count, round_products=not continuous
        )
        nonzeros = jnp.where(reached.any(), total, counts[-1])
        return first + segment, nonzeros, packed, matrix

    first = jnp.zeros((), jnp.int32)
    nonzeros = jnp.full((), columns, jnp.uint32)
    own = jnp.arange(rows)[:, None] < columns
    packed = jnp.where(own, givens.eye_support(*matrix.shape), jnp.uint32(0))
    start = varying_as((first, nonzeros, packed, matrix), key, twice_target, matrix)
    _, nonzeros, _, matrix = jax.lax.while_loop(unfinished, extend, start)
    if continuous:
        return matrix
    return jnp.where(2 * nonzeros < twice_target, jnp.nan, matrix)


def _eye(shape: tuple[int, int], columns: int | Array, scale: Array) -> Array:
    row, column = jnp.arange(shape[0])[:, None], jnp.arange(shape[1])[None, :]
    return jnp.where((row == column) & (row < columns), scale, jnp.zeros((), scale.dtype))


def permuted(key: Array, matrix: Array) -> Array:
    """Permute rows and columns uniformly and flip the sign of each row at random.

    ``matrix`` was drawn from the same key.
    """
    for_rows, for_columns, for_signs = jax.random.split(jax.random.fold_in(key, 1), 3)
    size, columns = matrix.shape
    matrix = matrix[jax.random.permutation(for_rows, size)]
    matrix = matrix[:, jax.random.permutation(for_columns, columns)]
    return matrix * jax.random.rademacher(for_signs, (size, 1), matrix.dtype)


@functools.lru_cache(maxsize=4096)
def _expected_rotations(size: int, density: float) -> int:
    return theory.num_rotations(size, density, method="closed_form")


def _segment_length(size: int, density: Any) -> int:
    """Choose the rotations of a segment: 1 to 4 per coordinate, so that few programs are compiled.

    It changes the speed and not the matrix. A static density gets one segment that nearly always
    suffices; for a traced one the four rotations per coordinate reach a density of about 0.4.
    """
    unit = max(size, 32)
    if checks.is_traced(density):
        return min(4 * unit, _MAX_SEGMENT)
    needed = _expected_rotations(size, float(density)) + size // 4
    return min(min(max(-(-needed // unit), 1), 4) * unit, _MAX_SEGMENT)


def check_angles(angles: Any) -> AngleLaw:
    if callable(angles):
        return angles
    if checks.is_traced(angles):
        raise checks.value_error(
            "angles", angles, "is traced", "Give a static angle or a law (key, dtype) -> scalar."
        )
    remedy = "Give an angle in radians away from the multiples of pi/2, or (key, dtype) -> scalar."
    angle = checks.finite_scalar(angles, "angles")
    if abs(math.sin(2 * angle)) < 1e-6:
        raise checks.value_error("angles", angle, "only permutes coordinates", remedy)
    return float(angle)
