r"""Sequences of Givens rotations: draw them, order them into waves, and find their support.

A Givens rotation in the plane :math:`(i, j)`, :math:`i \ne j`, by the angle :math:`\theta` maps

.. math::
    (a_i, a_j) \mapsto
    (\cos\theta\, a_i + \sin\theta\, a_j,\; -\sin\theta\, a_i + \cos\theta\, a_j)

and leaves every other coordinate unchanged. This module has everything about a sequence of
rotations that needs no floating-point products: drawing the sequence, the order in which commuting
rotations may be applied at once, and the zeros and non-zeros of the product with
:math:`[I \mid 0]`.

The library uses two facts. First, rotations in disjoint planes commute, so a sequence falls into a
few *waves* of disjoint rotations, and each wave is applied at once. Second, planes and angles are
independent, so for angles of a continuous law the *support* of the product can be computed on
integers: a rotation replaces the supports of its two rows by their union.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks, programs
from eoi_jax._internal.keys import threefry_key
from eoi_jax._internal.waves import assign_waves, eye_support, grow_support, unpack_support
from eoi_jax.planes import PlaneLaw, check, independent
from eoi_jax.typing import Array, DType, Shape

__all__ = [
    "AngleLaw",
    "Rotations",
    "continuous",
    "from_pairs",
    "hadamard_angle",
    "num_nonzeros",
    "sample",
    "support",
    "uniform_angle",
    "waves",
]

AngleLaw = float | Callable[[Array, DType], Array]
"""An angle in radians for every rotation, or ``(key, dtype) -> scalar`` that draws one."""

_Law = TypeVar("_Law", bound=Callable[[Array, DType], Array])

_assign_waves = jax.jit(assign_waves, static_argnames="size")
_STREAM = 0x454F49  # sets the rotations' stream apart from other uses of the key


class Rotations(NamedTuple):
    """A sequence of Givens rotations, applied from index 0 on.

    Attributes:
        i: ``(num_rotations,)`` int32, the first coordinate of each plane.
        j: ``(num_rotations,)`` int32, the second coordinate, never equal to ``i``.
        theta: ``(num_rotations,)`` floating, the angles in radians.

    Example:
        >>> import jax.numpy as jnp
        >>> from eoi_jax import givens, rotation
        >>> quarter = givens.Rotations(jnp.array([0]), jnp.array([1]), jnp.array([jnp.pi / 2]))
        >>> (rotation.as_matrix(quarter, size=2).round(3) + 0).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """

    i: Array
    j: Array
    theta: Array


def continuous(law: _Law) -> _Law:
    """Declare that a law of angles is continuous, so that non-zeros can be counted on integers.

    Angles of a continuous law cancel no entry to an exact zero (with probability one), so the
    support of a product of rotations follows from the planes alone. A 1024 x 1024 matrix of density
    0.1 then takes 4 ms on two CPU cores, and 14 ms with the same law undeclared. Other laws, such
    as a choice among 45 and 135 degrees, may cancel entries, so non-zeros are counted on the
    floats. The library cannot know whether the law of a given function is continuous. So without
    this declaration non-zeros are counted on the floats, which is correct for all laws.

    Args:
        law: ``(key, dtype) -> scalar``, an angle in radians that is never exactly a multiple of
            π/2. The function gets an attribute ``continuous``.

    Returns:
        The same function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> from eoi_jax import givens
        >>> @givens.continuous
        ... def small(key, dtype):
        ...     return jax.random.uniform(key, (), dtype, minval=0.1, maxval=0.2)
        >>> w = eoi.orthogonal(jax.random.key(0), (32, 32), density=0.25, angles=small)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(32), atol=1e-5))
        True
    """
    law.continuous = True  # type: ignore[attr-defined]
    return law


@continuous
def uniform_angle(key: Array, dtype: DType = jnp.float32) -> Array:
    r"""Draw one angle of :math:`U(0, 2\pi)`, the law of Exact Orthogonal Initialization.

    The angle is :math:`2\pi (b + \tfrac12)/2^p` for an integer :math:`b < 2^p` with :math:`p = 24`
    (53 for float64), so it is never 0 and never a multiple of :math:`\pi/2`: no rotation is only a
    permutation.

    Args:
        key: A PRNG key.
        dtype: A real floating dtype; narrower ones than float32 are drawn as float32.

    Returns:
        A scalar in (0, 2π), in radians.

    Raises:
        ValueError: If ``key`` is not one PRNG key, or ``dtype`` is not real floating.

    Example:
        >>> import jax
        >>> from eoi_jax import givens
        >>> bool(0 < givens.uniform_angle(jax.random.key(0)) < 6.2832)
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.1.
    """
    words = jax.random.bits(threefry_key(key), (2,), jnp.uint32)
    return _uniform(words, checks.float_dtype(dtype))


def hadamard_angle(key: Array, dtype: DType = jnp.float32) -> Array:
    r"""Draw one of the angles :math:`\pm 45°` and :math:`\pm 135°`, each with probability 1/4.

    Such a rotation multiplies by :math:`\pm 1/\sqrt 2`, so after :math:`r` full rounds of
    :data:`eoi_jax.planes.matching` the matrix is :math:`2^{-r/2}` times a matrix of integers. These
    are 0 and :math:`\pm 1` wherever no two supports have met, so all non-zeros have the same size,
    as in a Hadamard matrix. Where supports meet, entries double or cancel. A canceled entry is an
    exact zero and is not counted as a non-zero.

    Args:
        key: A PRNG key.
        dtype: A real floating dtype; narrower ones than float32 are drawn as float32.

    Returns:
        A scalar, in radians.

    Raises:
        ValueError: If ``key`` is not one PRNG key, or ``dtype`` is not real floating.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> options = dict(angles=eoi.givens.hadamard_angle, planes=eoi.planes.matching)
        >>> one_round = eoi.givens.sample(jax.random.key(0), 64, 32, **options)
        >>> w = abs(eoi.rotation.as_matrix(one_round, 64))
        >>> bool(((w == 0) | jnp.isclose(w, 0.5**0.5)).all())
        True
    """
    quarter = jax.random.bits(threefry_key(key), (), jnp.uint32) >> np.uint32(30)
    dtype = checks.compute_dtype(checks.float_dtype(dtype))
    return (quarter.astype(dtype) - 1.5) * jnp.asarray(math.pi / 2, dtype)


def sample(
    key: Array,
    size: int | Array,
    num_rotations: int,
    *,
    angles: AngleLaw = uniform_angle,
    dtype: DType = jnp.float32,
    first: int | Array = 0,
    planes: PlaneLaw = independent,
    capacity: int | None = None,
) -> Rotations:
    r"""Draw random rotations: planes from one law, and independent angles from another.

    Rotation ``t`` depends only on ``key`` and ``t``, so a longer sequence begins with the shorter
    one, and ``first`` continues it. Independent planes are uniform over ordered pairs up to a
    relative bias of ``size / 2**32``. Keys of every PRNG implementation are accepted. They seed a
    Threefry stream, so a batch of keys under :func:`jax.vmap` gives the same result as a loop.

    Args:
        key: A PRNG key.
        size: Number of coordinates, at least 2; may be traced.
        num_rotations: Length of the sequence, at least 0.
        angles: The law of the angles: a constant in radians or ``(key, dtype) -> scalar``.
        dtype: Real floating dtype of the angles; a narrower one than float32 becomes float32.
        first: Index of the first rotation to return, in [0, 2**32 - num_rotations]; may be traced.
        planes: The law of the planes, of :mod:`eoi_jax.planes`.
        capacity: A number that a traced ``size`` does not exceed; it changes no plane. Needed only
            for matchings of a traced size.

    Returns:
        :class:`Rotations` of ``num_rotations`` planes and angles.

    Raises:
        ValueError: If ``size``, ``num_rotations`` or ``first`` is out of range, if ``angles`` is
            neither a finite number nor a law, if ``dtype`` is not floating, if ``planes`` is no
            law of planes or a law of another size, or if ``capacity`` is below ``size`` or missing.

    Example:
        >>> import jax
        >>> from eoi_jax import givens
        >>> rotations = givens.sample(jax.random.key(0), size=8, num_rotations=5)
        >>> rotations.i.shape, rotations.theta.dtype
        ((5,), dtype('float32'))
        >>> bool((rotations.i != rotations.j).all())
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.1.
    """
    key = threefry_key(key)
    check(planes)
    angles = angles if callable(angles) else checks.number(angles, "angles")
    if capacity is not None:
        capacity = checks.integer(capacity, low=2, high=2**31 - 1, name="capacity")
    if not isinstance(size, jax.core.Tracer):
        size = checks.integer(
            size, low=2, high=2**31 - 1, name="size", remedy="A plane takes two coordinates."
        )
        if capacity is not None and capacity < size:
            raise checks.value_error(
                "capacity", capacity, f"is below size={size}", "Leave it out: size is static."
            )
        # One program for each size of other laws, one for all sizes of independent planes.
        capacity = None if planes is independent else size
    elif not jnp.issubdtype(size.dtype, jnp.integer):
        raise checks.value_error("size", size, "is no integer", "Convert it to int32.")
    planes = planes.of_size(size)
    num_rotations = checks.integer(num_rotations, low=0, high=2**31 - 1, name="num_rotations")
    dtype = checks.compute_dtype(checks.float_dtype(dtype))
    if not checks.is_traced(first):
        # Rotations are counted by 32 bits.
        remedy = "Draw no more than 2**32 rotations from a key."
        high = 2**32 - num_rotations
        first = checks.integer(first, low=0, high=high, name="first", remedy=remedy)
        first %= 2**32  # 2**32 itself begins no rotation
    first, size = jnp.asarray(first, jnp.uint32), jnp.asarray(size, jnp.uint32)
    program = programs.of_function(_sample, angles, static_argnums=(3, 4, 5, 6))
    rotations: Rotations = program(key, first, size, num_rotations, dtype, planes, capacity)
    return rotations


def from_pairs(
    key: Array,
    pairs: Any,
    *,
    angles: AngleLaw = uniform_angle,
    dtype: DType = jnp.float32,
) -> Rotations:
    """Make a sequence of rotations in given planes, in their order, with angles drawn from a law.

    Use it to control the support: only coordinates that the pairs connect are mixed. For random
    pairs inside a pattern see :func:`eoi_jax.planes.within`.

    Args:
        key: A PRNG key, for the angles.
        pairs: ``(num_rotations, 2)`` integers, the planes; the two coordinates of a pair differ.
        angles: The law of the angles: a constant in radians or ``(key, dtype) -> scalar``.
        dtype: Real floating dtype of the angles; a narrower one than float32 becomes float32.

    Returns:
        :class:`Rotations` in the order of ``pairs``.

    Raises:
        ValueError: If ``pairs`` is not ``(num_rotations, 2)`` integers, or has a negative
            coordinate or a pair of equal coordinates.

    Example:
        >>> import jax
        >>> from eoi_jax import givens
        >>> rotations = givens.from_pairs(jax.random.key(0), [(0, 1), (2, 3), (1, 2)])
        >>> givens.waves(rotations, size=4).tolist()
        [0, 0, 1]
    """
    key = threefry_key(key)
    angles = angles if callable(angles) else checks.number(angles, "angles")
    dtype = checks.compute_dtype(checks.float_dtype(dtype))
    remedy = "Give one row (i, j) of two different non-negative coordinates for each rotation."
    if not isinstance(pairs, jax.Array):
        pairs = np.asarray(pairs)
    if np.ndim(pairs) != 2 or np.shape(pairs)[1] != 2:
        raise checks.value_error(
            "pairs.shape", np.shape(pairs), "is outside (num_rotations, 2)", remedy
        )
    if not jnp.issubdtype(pairs.dtype, jnp.integer):
        raise checks.value_error("pairs.dtype", pairs.dtype.name, "is not integer", remedy)
    if not checks.is_traced(pairs):
        planes = np.asarray(pairs)
        outside = (planes < 0) | (planes > 2**31 - 1)
        bad = np.flatnonzero(outside.any(1) | (planes[:, 0] == planes[:, 1]))
        if bad.size:
            raise checks.value_error(
                f"pairs[{bad[0]}]", tuple(planes[bad[0]].tolist()), "is not a plane", remedy
            )
    pairs = jnp.asarray(pairs, jnp.int32)
    words = _words(key, jnp.arange(len(pairs), dtype=jnp.uint32))
    theta = jax.vmap(lambda row: _angle(row[2:], angles, dtype))(words)
    return Rotations(pairs[:, 0], pairs[:, 1], theta)


def waves(rotations: Rotations, size: int) -> Array:
    r"""Order a sequence into waves of disjoint rotations.

    The wave of rotation :math:`t` is :math:`w_t = 1 + \max w_s` over the earlier rotations
    :math:`s` that share a coordinate with it, and 0 if there are none. All rotations of one
    wave are disjoint, and applying wave after wave gives the product of the sequence. The waves of
    a prefix of the sequence are a prefix of its waves.

    Args:
        rotations: The sequence.
        size: Number of coordinates.

    Returns:
        ``(num_rotations,)`` int32, the wave of each rotation.

    Raises:
        ValueError: If ``size < 2``, if the three leaves differ in length, or if a plane (where it
            is not traced) is not a pair of different coordinates below ``size``.

    Example:
        >>> import jax
        >>> from eoi_jax import givens
        >>> planes = givens.from_pairs(jax.random.key(0), [(0, 1), (0, 2), (3, 4), (2, 4)])
        >>> givens.waves(planes, size=5).tolist()
        [0, 1, 0, 2]
    """
    size = checks.integer(size, low=2, name="size")
    rotations = Rotations(*checks.rotations(rotations, size))
    return _assign_waves(rotations.i, rotations.j, size)


def support(rotations: Rotations, shape: Shape) -> Array:
    r"""Support of :math:`G_T \cdots G_1 [I \mid 0]` for angles of a continuous law.

    At each rotation the supports of row :math:`i` and row :math:`j` both become their union; the
    angles are not used. With probability one the product is non-zero exactly there.

    Args:
        rotations: The sequence, over ``max(shape)`` coordinates.
        shape: ``(n, m)``; a wide matrix is the transpose of the tall one.

    Returns:
        ``(n, m)`` booleans.

    Raises:
        ValueError: If ``shape`` is not two positive ints, or for rotations that :func:`waves`
            refuses.

    Example:
        >>> import jax
        >>> from eoi_jax import givens
        >>> planes = givens.from_pairs(jax.random.key(0), [(0, 1), (1, 2)])
        >>> givens.support(planes, (3, 3)).astype(int).tolist()
        [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    """
    n, m = _matrix_shape(shape)
    rotations = Rotations(*checks.rotations(rotations, max(n, m)))
    packed, _ = _simulate(rotations, max(n, m), min(n, m))
    full = unpack_support(packed, min(n, m))
    return full if n >= m else full.T


def num_nonzeros(rotations: Rotations, shape: Shape) -> Array:
    """Count the non-zeros of the product after each prefix of the sequence.

    Args:
        rotations: The sequence, over ``max(shape)`` coordinates, with angles of a continuous law.
        shape: ``(n, m)`` with ``n * m < 2**31``.

    Returns:
        ``(num_rotations + 1,)`` uint32: entry ``t`` is the count after ``t`` rotations; entry 0 is
        ``min(n, m)``.

    Raises:
        ValueError: If ``shape`` is not two positive ints with a product below 2**31, or for
            rotations that :func:`waves` refuses.

    Example:
        >>> import jax
        >>> from eoi_jax import givens
        >>> planes = givens.from_pairs(jax.random.key(0), [(0, 1), (1, 2)])
        >>> givens.num_nonzeros(planes, (3, 3)).tolist()
        [3, 5, 8]
    """
    n, m = _matrix_shape(shape)
    rotations = Rotations(*checks.rotations(rotations, max(n, m)))
    _, gained = _simulate(rotations, max(n, m), min(n, m))
    start = jnp.full((1,), min(n, m), jnp.uint32)
    return jnp.cumsum(jnp.concatenate([start, gained]), dtype=jnp.uint32)


def _sample(
    angles: AngleLaw,
    key: Array,
    first: Array,
    size: Array,
    num_rotations: int,
    dtype: DType,
    planes: PlaneLaw,
    capacity: int | None,
) -> Rotations:
    words = _words(key, first + jnp.arange(num_rotations, dtype=jnp.uint32))
    i, j = planes.sample(key, first, words[:, :2], size, capacity)
    theta = jax.vmap(lambda row: _angle(row, angles, dtype))(words[:, 2:])
    return Rotations(i, j, theta)


@functools.partial(jax.jit, static_argnames=("rows", "columns"))
def _simulate(rotations: Rotations, rows: int, columns: int) -> tuple[Array, Array]:
    """Rotate the support of the partial identity."""
    wave = assign_waves(rotations.i, rotations.j, rows)
    return grow_support(eye_support(rows, columns), rotations, wave)


def _matrix_shape(shape: Shape) -> tuple[int, int]:
    n, m, *more = dims = checks.shape(shape)
    if more or not 0 < n * m < 2**31:
        raise checks.value_error(
            "shape", dims, "is not (n, m) with 0 < n * m < 2**31", "Count one matrix at a time."
        )
    return n, m


def _words(key: Array, index: Array) -> Array:
    """Draw four random words for each rotation, from the key and the rotation's index alone.

    The key is one of Threefry.
    """
    words = jax.random.key_data(key) ^ np.uint32(_STREAM)
    stream = jax.random.wrap_key_data(words, impl="threefry2x32")

    def at(index: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(stream, index), (4,), jnp.uint32)

    return jax.vmap(at)(index)


def _angle(words: Array, angles: AngleLaw, dtype: DType) -> Array:
    """Draw an angle from two random words: a law gets them as its key, the default reads them."""
    if angles is uniform_angle:
        return _uniform(words, dtype)
    if not callable(angles):
        return jnp.asarray(angles, dtype)
    angle = jnp.asarray(angles(jax.random.wrap_key_data(words, impl="threefry2x32"), dtype))
    found = f"shape {angle.shape}, outside ()" if angle.ndim else ""
    if jnp.issubdtype(angle.dtype, jnp.complexfloating):
        found = f"dtype {angle.dtype}, outside the real dtypes"
    if found:
        raise checks.value_error("angles", angles, f"returns {found}", "Draw one angle per key.")
    return angle.astype(dtype)


def _uniform(words: Array, dtype: DType) -> Array:
    dtype = checks.compute_dtype(dtype)
    if dtype == jnp.float64:
        high, low = words.astype(jnp.uint64)
        number, places = ((high << np.uint64(32)) | low) >> np.uint64(11), 53
    else:
        number, places = words[0] >> np.uint32(8), 24
    angle = (number.astype(dtype) + 0.5) * jnp.asarray(2 * math.pi / 2**places, dtype)
    return jnp.minimum(angle, np.nextafter(dtype.type(2 * math.pi), dtype.type(0)))
