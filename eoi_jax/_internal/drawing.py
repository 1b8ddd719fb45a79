"""Drawing one matrix: the loop that rotates the partial identity until its density is reached.

:func:`eoi_jax.sparse_orthogonal.orthogonal` and :func:`eoi_jax.networks.exact_orthogonal` both end
here, and from here it is one step down to the rotations of a wave.

Rotations mix rows, so each column of a matrix is drawn without the others. While a program is
traced in a mesh (:func:`jax.set_mesh`) the columns of a large matrix are divided among its devices,
which exchange nothing but counts; a small one is drawn by each device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from eoi_jax import givens
from eoi_jax._internal import checks, programs, shardings, waves
from eoi_jax._internal.keys import wrapped
from eoi_jax._internal.vmap import map_on_cpu, varying_as
from eoi_jax.givens import AngleLaw, PlaneLaw
from eoi_jax.typing import Array

__all__ = [
    "MAX_SEGMENT",
    "Law",
    "check_angles",
    "countable_nonzeros",
    "draw",
    "draw_padded",
    "permuted",
    "rounds_at_once",
]

# The least squared norm of a row of a balanced matrix, over the mean of all rows: a norm of half
# of the fair share, and what rounding to bfloat16 may take. Rows start at half of the mean or more.
_LEAST_SHARE = 0.2525
# Longer segments would have more touched coordinates than an index can count.
MAX_SEGMENT = 2**24
# In place of a count that has reached its target; a word holds twice its value.
_DONE = 2**31 - 1
# Smaller matrices are drawn sooner than divided.
_DIVIDED_FROM = 2**20


class Law(NamedTuple):
    """What is fixed when the program that draws matrices is compiled.

    Attributes:
        shape: ``(rows, columns)`` of the array, tall or square.
        segment: How many rotations are sampled at once; it changes the speed, not the matrix.
        angles: The law of the angles, or None where a program is given it apart.
        at_most: Whether to stop before a target is exceeded, and not at the closest count.
        permute: Whether rows and columns are permuted and signs drawn at the end.
        planes: The law of the planes, of the size of the array or of any.
        rounds: How many rounds of matchings to apply to the partial identity at once, before the
            segments; it changes the speed, and the matrix by rounding errors. 0 for other planes,
            and for angles whose non-zeros are counted on the floats.
        axes: The axes of the mesh that divide the columns, where a program is traced in one.
    """

    shape: tuple[int, int]
    segment: int
    angles: Any
    at_most: bool
    permute: bool = False
    planes: PlaneLaw = givens.independent
    rounds: int = 0
    axes: tuple[str, ...] = ()


class _Columns(NamedTuple):
    """The columns of a matrix that one device draws.

    Attributes:
        numbers: Which columns of the matrix; beyond its number of columns for none.
        axes: The axes of the mesh that divide them.
    """

    numbers: Array
    axes: tuple[str, ...]


class _Target(NamedTuple):
    """The count of non-zeros to stop at, doubled: the middle of two counts is an integer too."""

    twice: Array
    accepts_tie: Array
    is_valid: Array


def draw(key: Array, target: Array, scale: Array, law: Law, balanced: Array | None = None) -> Array:
    """Draw a matrix of ``law.shape`` for a density, or for an integer count of non-zeros.

    The entries have the dtype of ``scale``. A target that no matrix can have gives NaN. Where
    ``balanced`` is true, no row's norm is below half of the root of their mean square (``scale`` is
    then near 1); None draws as false does, by a program that costs less.
    """
    program = programs.of_function(_draw, law.angles, static_argnums=(3, 5))
    mesh = shardings.mesh_of_context(key)
    return program(key, target, scale, law._replace(angles=None), balanced, mesh)


def _draw(
    angles: AngleLaw,
    key: Array,
    target: Array,
    scale: Array,
    law: Law,
    balanced: Array | None,
    mesh: Any,
) -> Array:
    law = law._replace(angles=angles)
    rows, columns = law.shape

    def one(
        part: _Columns | None, key: Array, target: Array, scale: Array, *balanced: Array
    ) -> Array:
        return _rotate_to_target(key, target, scale, rows, columns, law, part, *balanced)

    flags = [] if balanced is None else [balanced]
    return _on_mesh(one, law, mesh, is_divisible=not flags)(key, target, scale, *flags)


def _on_mesh(
    one: Callable[..., Array], law: Law, mesh: Any, *, is_divisible: bool, is_stack: bool = False
) -> Callable[..., Array]:
    """Let the devices of a mesh draw a matrix, or a stack of them, by ``one(columns, *arrays)``.

    Which device draws a column changes no bit of it. Without a mesh the compiler divides the work.
    """

    def undivided(*arrays: Array) -> Array:
        draw = map_on_cpu(functools.partial(one, None))
        return (jax.vmap(draw) if is_stack else draw)(*arrays)

    if mesh is None:
        return undivided
    axes, columns = law.axes, law.shape[1]
    if not is_divisible or not axes or math.prod(law.shape) < _DIVIDED_FROM:
        return shardings.on_every_device(undivided, mesh)
    width = -(-columns // math.prod(mesh.shape[axis] for axis in axes))

    def draw_part(index: Array, *arrays: Array) -> Array:
        return one(_Columns(index, axes), *arrays)

    def draw_columns(*arrays: Array) -> Array:
        index = jax.lax.axis_index(axes) * width + jnp.arange(width, dtype=jnp.int32)
        draw = map_on_cpu(draw_part)
        in_axes = (None, *[0] * len(arrays))
        return (jax.vmap(draw, in_axes) if is_stack else draw)(index, *arrays)

    def divided(*arrays: Array) -> Array:
        spec = PartitionSpec(*[None] * (1 + is_stack), axes)
        draw = jax.shard_map(
            draw_columns, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec, check_vma=False
        )
        return draw(*arrays)[..., :columns]

    return divided


def draw_padded(
    keys: Array,
    counts: Array,
    rows: Array,
    columns: Array,
    law: Law,
    dtype: Any,
    balanced: Array | None = None,
) -> Array:
    """Draw a stack of matrices ``(rows, columns)``, each in the corner of zeros of ``law.shape``.

    All arrays have one entry for each matrix. So one program, whose compilation takes far longer
    than its run, draws matrices of many shapes. ``counts`` are at least ``columns``, and at least
    ``rows`` where ``balanced`` is true. Planes of one size fill ``law.shape``, and so do the
    matrices then; so do they where they are permuted. Keys may be given as their words.
    """
    program = programs.of_function(_draw_padded, law.angles, static_argnums=(4, 5, 7))
    law, mesh = law._replace(angles=None), shardings.mesh_of_context(keys)
    return program(keys, counts, rows, columns, law, dtype, balanced, mesh)


def _draw_padded(
    angles: AngleLaw,
    keys: Array,
    counts: Array,
    rows: Array,
    columns: Array,
    law: Law,
    dtype: Any,
    balanced: Array | None,
    mesh: Any,
) -> Array:
    law = law._replace(angles=angles)

    def one(
        part: _Columns | None,
        key: Array,
        count: Array,
        rows: int | Array,
        columns: int | Array,
        *balanced: Array,
    ) -> Array:
        if law.planes.size is not None:
            rows, columns = law.shape
        scale = jnp.ones((), dtype)
        return _rotate_to_target(key, count, scale, rows, columns, law, part, *balanced)

    flags = [] if balanced is None else [balanced]
    draw = _on_mesh(one, law, mesh, is_divisible=not flags, is_stack=True)
    return draw(wrapped(keys), counts, rows, columns, *flags)


def rounds_at_once(shape: tuple[int, int], planes: PlaneLaw, needed: int | None = None) -> int:
    """Choose the rounds of matchings to apply at once to a partial identity of ``shape``.

    Args:
        shape: Tall or square.
        planes: The law; all others than matchings have none.
        needed: How many rotations are expected at most; None if that is not known.
    """
    if not planes.in_rounds or shape[0] < 2:
        return 0
    # Lists of an eighth of a row are cheaper than rows; in all they hold 32 MiB at most.
    most = max(min(shape[1].bit_length() - 4, 7, 22 - (shape[0] - 1).bit_length()), 0)
    return most if needed is None else min(most, -(-needed // (shape[0] // 2)))


def countable_nonzeros(rows: int, columns: int) -> int:
    """Count the non-zeros that a tall matrix may be asked for: a word holds twice their number.

    The rotation that reaches a target may exceed it by one non-zero in each column, if the matrix
    has more entries.
    """
    size = rows * columns
    return size if size <= _DONE else _DONE - columns


def check_reached(matrix: Any, density: Any, planes: PlaneLaw) -> None:
    """Refuse matrices of NaN, which planes in a pattern did not bring to their density.

    It waits for the matrices, so those of other planes, which reach every density, are not checked.
    """
    if not planes.is_pattern or checks.is_traced(matrix) or not bool(jnp.isnan(matrix).any()):
        return
    remedy = (
        "Rotations by equal angles may undo one another: use the default law of angles, or lower "
        "the density."
    )
    raise checks.value_error("density", density, f"is not reached inside planes={planes!r}", remedy)


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
    _, for_columns, _ = _permutation_keys(key)
    order = jax.random.permutation(for_columns, matrix.shape[1])
    return _permuted_rows(key, matrix[:, order])


def _permuted_rows(key: Array, matrix: Array) -> Array:
    for_rows, _, for_signs = _permutation_keys(key)
    size = len(matrix)
    matrix = matrix[jax.random.permutation(for_rows, size)]
    return matrix * jax.random.rademacher(for_signs, (size, 1), matrix.dtype)


def _permutation_keys(key: Array) -> Array:
    return jax.random.split(jax.random.fold_in(key, 1), 3)


def _rotate_to_target(
    key: Array,
    target: Array,
    scale: Array,
    rows: int | Array,
    columns: int | Array,
    law: Law,
    part: _Columns | None = None,
    balanced: Array | None = None,
) -> Array:
    """Rotate the partial identity in the corner ``(rows, columns)`` of zeros to a target.

    Rotations come in segments of a static length, each with waves of its own. The non-zeros of
    every prefix of a segment are counted first, and only the rotations that are kept touch the
    floats. ``rows`` and ``columns`` may be traced, and change no value of the matrix by being so.

    A ``balanced`` matrix starts as the identity again and again, with a new sign each time and
    columns of norm 1, so each row has a non-zero. Angles keep the norms of rows above a floor,
    which takes whole rows. Of other matrices only ``part`` is drawn, if it is given.
    """
    least: int | Array = columns if balanced is None else jnp.where(balanced, rows, columns)
    most = law.planes.max_nonzeros(rows, columns)
    if not checks.is_traced(most):
        most = min(most, countable_nonzeros(*law.shape))
    bounds = (least, most)
    goal = _doubled(target, rows, columns, bounds, law.at_most)
    i = jnp.arange(law.shape[0], dtype=jnp.int32)
    one, floor = jnp.where(goal.is_valid, scale, jnp.nan), None
    width = law.shape[1] if part is None else len(part.numbers)
    if balanced is None:
        share: int | Array = 1
        column = jnp.where(i < columns, i, law.shape[1])  # past the end: a row of zeros
    else:
        column = jnp.where(balanced & (i < rows), i % columns, i)
        column = jnp.where(i < least, column, law.shape[1])
        shared_by = (rows - 1 - column) // columns + 1  # the rows with a non-zero in that column
        sign = 1 - 2 * (i // columns % 2)
        root = jax.lax.rsqrt(shared_by.astype(scale.dtype))
        share = jnp.where(balanced, sign * root, 1)[:, None]
        floor = jnp.where(balanced, _LEAST_SHARE * columns / rows, 0).astype(scale.dtype)
    if part is not None:
        index = part.numbers
        if law.permute:
            _, for_columns, _ = _permutation_keys(key)
            order = jax.random.permutation(for_columns, law.shape[1])
            index = order.at[index].get(mode="fill", fill_value=law.shape[1])
        # Where each column of the matrix stands in the part.
        place = jnp.full(law.shape[1] + 1, width, jnp.int32)
        place = place.at[index].set(jnp.arange(width, dtype=jnp.int32), mode="drop")
        column = place.at[law.shape[1]].set(width)[column]
    here = jnp.arange(width, dtype=jnp.int32)[None] == column[:, None]
    matrix = jnp.where(here, one * share, jnp.zeros((), scale.dtype))
    packed = waves.one_hot_support(column, width)
    if law.shape[0] == 1:
        return permuted(key, matrix) if law.permute else matrix
    # Angles that recur cancel entries to exact zeros, which only the floats show.
    count_on_integers = getattr(law.angles, "continuous", False) and not law.planes.may_underflow
    # Only an angle law that undoes its own work gets here, or the slowest of patterns.
    limit = min(law.planes.rotations_until_full(law.shape[0]), 2**31 - 1 - law.segment)
    State = tuple[Array, Array, Array, Array]

    def unfinished(state: State) -> Array:
        first, nonzeros, _, _ = state
        return (2 * nonzeros < goal.twice) & (first < limit)

    def extend(state: State, length: int, rounds: int = 0) -> State:
        first, nonzeros, packed, matrix = state
        rotations = givens.sample(
            key,
            rows,
            length,
            angles=law.angles,
            dtype=matrix.dtype,
            first=first,
            planes=law.planes,
            capacity=law.shape[0],
        )
        wave = law.planes.waves(rotations.i, rotations.j, first, rows, law.shape[0])
        if count_on_integers:
            packed, gained = waves.grow_support(
                packed, rotations, wave, in_order=law.planes.in_rounds
            )
        else:
            _, change = waves.rotate_and_count(matrix, rotations, wave, floor=floor)
            gained = change.astype(jnp.uint32)  # wraps, and wraps back in the sum
        if part is not None:
            gained = jax.lax.psum(gained, part.axes)
        counts = nonzeros + jnp.cumsum(gained, dtype=jnp.uint32)
        reached = 2 * counts >= goal.twice
        crossing = jnp.argmax(reached)
        # The crossing rotation is kept if its count fits, or else if it is no further from the
        # target than the count before it.
        other = counts[crossing] if law.at_most else counts[crossing] - gained[crossing]
        fits = counts[crossing] + other < goal.twice + goal.accepts_tie
        keep = jnp.where(fits, crossing + 1, crossing)
        count = jnp.where(reached.any(), keep, length).astype(jnp.int32)
        if rounds:
            matrix = waves.rotated_eye(one, column, width, rotations, count=count)
        else:
            matrix = waves.rotate_rows(
                matrix,
                rotations,
                wave,
                count=count,
                round_products=not count_on_integers,
                in_order=law.planes.in_rounds,
                floor=floor,
            )
        return (
            first + length,
            jnp.where(reached.any(), jnp.uint32(_DONE), counts[-1]),
            packed,
            matrix,
        )

    first, nonzeros = jnp.zeros((), jnp.int32), jnp.full((), least, jnp.uint32)
    start = varying_as((first, nonzeros, packed, matrix), key, goal, matrix)
    if law.rounds and count_on_integers and balanced is None:
        start = extend(start, law.rounds * (law.shape[0] // 2), law.rounds)
    more = functools.partial(extend, length=law.segment)
    _, nonzeros, _, matrix = jax.lax.while_loop(unfinished, more, start)
    if not count_on_integers or law.planes.size is not None:
        matrix = jnp.where(2 * nonzeros < goal.twice, jnp.nan, matrix)
    if not law.permute:
        return matrix
    return permuted(key, matrix) if part is None else _permuted_rows(key, matrix)


def _doubled(
    target: Array,
    rows: int | Array,
    columns: int | Array,
    bounds: tuple[int | Array, int | Array],
    at_most: bool,
) -> _Target:
    """Double the count that a target asks for, and tell whether a matrix can have it.

    ``bounds`` are the fewest and the most non-zeros of one.
    """
    least, most = bounds
    total = rows * columns
    yes, twice_most = jnp.uint32(1), 2 * jnp.asarray(most, jnp.uint32)
    if jnp.issubdtype(target.dtype, jnp.integer):
        is_valid = (target >= least) & (target <= most)
        return _Target(2 * jnp.clip(target, least, most).astype(jnp.uint32), yes, is_valid)
    # Not least / total: with as many non-zeros as columns it is 1 / rows to the last bit.
    lowest, highest = 1 / (rows + columns - least), most / total
    # As the least density, the greatest may be rounded, but 1 is 1.
    is_valid = target >= (1 - 1e-6) * lowest
    is_valid &= target <= jnp.minimum((1 + 1e-6) * highest, 1)
    density = jnp.where(is_valid, jnp.clip(target, lowest, highest), lowest)
    if at_most:
        twice = 2 * jnp.floor(1.0 * total * density + 0.5).astype(jnp.uint32)
        return _Target(jnp.minimum(twice, twice_most), yes, is_valid)
    # The slack takes back what rounding a density such as 0.3 to float32 may have moved.
    slack = 2 * jnp.finfo(density.dtype).eps
    twice = 2.0 * total * density
    up, down = jnp.ceil(twice * (1 - slack)), jnp.floor(twice * (1 + slack))
    # Two counts can be equally near only where the doubled target is an integer.
    up_count = jnp.minimum(up.astype(jnp.uint32), twice_most)
    return _Target(up_count, (down >= up).astype(jnp.uint32), is_valid)
