"""Drawing one matrix: the loop that rotates the partial identity until its density is reached.

:func:`eoi_jax.sparse_orthogonal.orthogonal` and :func:`eoi_jax.networks.exact_orthogonal` both end
here, and from here it is one step down to the rotations of a wave.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eoi_jax import givens
from eoi_jax._internal import checks, programs, waves
from eoi_jax._internal.vmap import map_on_cpu, varying_as
from eoi_jax.givens import AngleLaw, PlaneLaw
from eoi_jax.typing import Array

__all__ = ["MAX_SEGMENT", "Law", "check_angles", "draw", "draw_padded", "permuted"]

# A sequence is given up after this many rotations per coordinate. Every row of a 4096 x 4096
# matrix is full after about 9 and the chance that one is not after 64 is below 1e-45, so only an
# angle law that undoes its own work gets here (and then returns NaN).
_LIMIT = 64
# Longer segments would have more touched coordinates than an index can count.
MAX_SEGMENT = 2**24


class Law(NamedTuple):
    """What is fixed when the program that draws matrices is compiled.

    Attributes:
        shape: ``(rows, columns)`` of the array, tall or square.
        segment: How many rotations are sampled at once; it changes the speed, not the matrix.
        angles: The law of the angles, or None where a program is given it apart.
        at_most: Whether to stop before a target is exceeded, and not at the closest count.
        permute: Whether rows and columns are permuted and signs drawn at the end.
        planes: The law of the planes.
    """

    shape: tuple[int, int]
    segment: int
    angles: Any
    at_most: bool
    permute: bool = False
    planes: PlaneLaw = givens.independent


class _Target(NamedTuple):
    """The count of non-zeros to stop at, doubled: the middle of two counts is an integer too."""

    twice: Array
    accepts_tie: Array
    is_valid: Array


def draw(key: Array, target: Array, scale: Array, law: Law) -> Array:
    """Draw a matrix of ``law.shape`` for a density, or for an integer count of non-zeros.

    The entries have the dtype of ``scale``. A target that no matrix can have gives NaN.
    """
    program = programs.of_function(_draw, law.angles, static_argnums=(3,))
    return program(key, target, scale, law._replace(angles=None))


def _draw(angles: AngleLaw, key: Array, target: Array, scale: Array, law: Law) -> Array:
    law = law._replace(angles=angles)
    rows, columns = law.shape

    def one(key: Array, target: Array, scale: Array) -> Array:
        matrix = _rotate_to_target(key, target, scale, rows, columns, law)
        return permuted(key, matrix) if law.permute else matrix

    return map_on_cpu(one)(key, target, scale)


def draw_padded(
    keys: Array, counts: Array, rows: Array, columns: Array, law: Law, dtype: Any
) -> Array:
    """Draw a stack of matrices ``(rows, columns)``, each in the corner of zeros of ``law.shape``.

    All arrays have one entry for each matrix. So one program, whose compilation takes far longer
    than its run, draws matrices of many shapes. ``counts`` are at least ``columns``.
    """
    program = programs.of_function(_draw_padded, law.angles, static_argnums=(4, 5))
    return program(keys, counts, rows, columns, law._replace(angles=None), dtype)


def _draw_padded(
    angles: AngleLaw,
    keys: Array,
    counts: Array,
    rows: Array,
    columns: Array,
    law: Law,
    dtype: Any,
) -> Array:
    law = law._replace(angles=angles)

    def one(key: Array, count: Array, rows: Array, columns: Array) -> Array:
        return _rotate_to_target(key, count, jnp.ones((), dtype), rows, columns, law)

    return jax.vmap(map_on_cpu(one))(keys, counts, rows, columns)


def check_angles(angles: Any) -> AngleLaw:
    """Accept a law of angles, or a static angle whose rotations do more than permute."""
    if callable(angles):
        return angles
    if checks.is_traced(angles):
        raise checks.value_error(
            "angles", angles, "is traced", "Give a static angle or a law (key, dtype) -> scalar."
        )
    remedy = "Give an angle in radians away from the multiples of pi/2, or (key, dtype) -> scalar."
    angle = checks.number(angles, "angles")
    if abs(math.sin(2 * angle)) < 1e-6:
        raise checks.value_error("angles", angle, "only permutes coordinates", remedy)
    return float(angle)


def permuted(key: Array, matrix: Array) -> Array:
    """Permute rows and columns uniformly and flip the sign of each row at random.

    ``matrix`` was drawn from the same key.
    """
    for_rows, for_columns, for_signs = jax.random.split(jax.random.fold_in(key, 1), 3)
    size, columns = matrix.shape
    matrix = matrix[jax.random.permutation(for_rows, size)]
    matrix = matrix[:, jax.random.permutation(for_columns, columns)]
    return matrix * jax.random.rademacher(for_signs, (size, 1), matrix.dtype)


def _rotate_to_target(
    key: Array, target: Array, scale: Array, rows: int | Array, columns: int | Array, law: Law
) -> Array:
    """Rotate the partial identity in the corner ``(rows, columns)`` of zeros to a target.

    Rotations come in segments of a static length, each with waves of its own. The non-zeros of
    every prefix of a segment are counted first, and only the rotations that are kept touch the
    floats. ``rows`` and ``columns`` may be traced, and change no value of the matrix by being so.
    """
    goal = _doubled(target, rows, columns, law.at_most)
    i, j = jnp.arange(law.shape[0])[:, None], jnp.arange(law.shape[1])[None, :]
    one = jnp.where(goal.is_valid, scale, jnp.nan)
    matrix = jnp.where((i == j) & (i < columns), one, jnp.zeros((), scale.dtype))
    if law.shape[0] == 1:
        return matrix
    # Angles that recur cancel entries to exact zeros, which only the floats show.
    count_on_integers = getattr(law.angles, "continuous", False)
    full = jnp.asarray(rows * columns, jnp.uint32)
    limit = min(_LIMIT * law.shape[0], 2**31 - 1 - law.segment)
    State = tuple[Array, Array, Array, Array]

    def unfinished(state: State) -> Array:
        first, nonzeros, _, _ = state
        return (2 * nonzeros < goal.twice) & (first < limit)

    def extend(state: State) -> State:
        first, nonzeros, packed, matrix = state
        rotations = givens.sample(
            key,
            rows,
            law.segment,
            angles=law.angles,
            dtype=matrix.dtype,
            first=first,
            planes=law.planes,
            capacity=law.shape[0],
        )
        wave = givens.waves(rotations, law.shape[0])
        if count_on_integers:
            packed, gained = waves.grow_support(packed, rotations, wave)
        else:
            _, change = waves.rotate_and_count(matrix, rotations, wave)
            gained = change.astype(jnp.uint32)  # wraps, and wraps back in the sum
        counts = nonzeros + jnp.cumsum(gained, dtype=jnp.uint32)
        reached = 2 * counts >= goal.twice
        crossing = jnp.argmax(reached)
        # The crossing rotation is kept if its count fits, or else if it is no further from the
        # target than the count before it.
        other = counts[crossing] if law.at_most else counts[crossing] - gained[crossing]
        fits = counts[crossing] + other < goal.twice + goal.accepts_tie
        keep = jnp.where(fits, crossing + 1, crossing)
        count = jnp.where(reached.any(), keep, law.segment).astype(jnp.int32)
        matrix = waves.rotate_rows(
            matrix, rotations, wave, count=count, round_products=not count_on_integers
        )
        return first + law.segment, jnp.where(reached.any(), full, counts[-1]), packed, matrix

    packed = jnp.where(i < columns, waves.eye_support(*law.shape), jnp.uint32(0))
    zero, nonzeros = jnp.zeros((), jnp.int32), jnp.full((), columns, jnp.uint32)
    start = varying_as((zero, nonzeros, packed, matrix), key, goal, matrix)
    _, nonzeros, _, matrix = jax.lax.while_loop(unfinished, extend, start)
    if count_on_integers:
        return matrix
    return jnp.where(2 * nonzeros < goal.twice, jnp.nan, matrix)


def _doubled(target: Array, rows: int | Array, columns: int | Array, at_most: bool) -> _Target:
    """Double the count that a target asks for, and tell whether a matrix can have it."""
    total = rows * columns
    yes = jnp.uint32(1)
    if jnp.issubdtype(target.dtype, jnp.integer):
        is_valid = (target >= columns) & (target <= total)
        return _Target(2 * jnp.clip(target, columns, total).astype(jnp.uint32), yes, is_valid)
    is_valid = (target >= (1 - 1e-6) / rows) & (target <= 1)
    density = jnp.where(is_valid, jnp.clip(target, 1 / rows, 1), 1 / rows)
    if at_most:
        return _Target(2 * jnp.floor(total * density + 0.5).astype(jnp.uint32), yes, is_valid)
    # The slack takes back what rounding a density such as 0.3 to float32 may have moved.
    slack = 2 * jnp.finfo(density.dtype).eps
    twice = 2.0 * total * density
    up, down = jnp.ceil(twice * (1 - slack)), jnp.floor(twice * (1 + slack))
    # Two counts can be equally near only where the doubled target is an integer.
    return _Target(up.astype(jnp.uint32), (down >= up).astype(jnp.uint32), is_valid)
