"""Applying a sequence of Givens rotations to an array, wave by wave."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from eoi_jax import givens
from eoi_jax._internal import checks
from eoi_jax._internal.waves import Block, scan_waves
from eoi_jax.givens import Rotations
from eoi_jax.typing import Array, DType

__all__ = ["as_matrix", "rotate"]


def rotate(matrix: Array, rotations: Rotations, *, axis: int = -1) -> Array:
    r"""Apply a sequence of rotations to the vectors along one axis.

    With :math:`G = G_T \cdots G_1` every vector :math:`a` along ``axis`` becomes :math:`G a`; for
    a matrix, ``axis=0`` gives :math:`G W` and ``axis=1`` gives :math:`W G^\top`. Disjoint rotations
    are applied at once, which copies nothing and costs 4 multiplications per rotation and vector;
    the result is that of the sequential product.

    Args:
        matrix: ``(..., size, ...)`` floating array with ``size >= 2`` along ``axis``.
        rotations: the sequence, with coordinates below ``size``.
        axis: the axis of the coordinates.

    Returns:
        An array of the shape and dtype of ``matrix``; narrower dtypes than float32 are rotated in
        float32 and cast last.

    Raises:
        ValueError: if ``matrix`` is not floating, ``axis`` is out of range, the axis is shorter
            than 2, or (where they are not traced) a coordinate is outside ``[0, size)``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import givens, rotation
        >>> turns = givens.sample(jax.random.key(0), size=6, num_rotations=20)
        >>> w = rotation.rotate(jnp.eye(6), turns, axis=0)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(6), atol=1e-6))
        True

    Reference:
        Nowak et al., *Sparser, Better, Deeper, Stronger* (ICML 2024), section 4.1.
    """
    matrix = jnp.asarray(matrix)
    dtype = checks.float_dtype(matrix.dtype, name="matrix.dtype")
    axis = checks.axis(axis, matrix.ndim)
    size = checks.integer(
        matrix.shape[axis],
        low=2,
        name=f"matrix.shape[{axis}]",
        remedy="A plane takes two coordinates.",
    )
    checks.rotations(rotations, size)
    return _rotate(matrix, rotations, axis, dtype)


def as_matrix(rotations: Rotations, size: int) -> Array:
    r"""Multiply a sequence out, one rotation after another: :math:`G_T \cdots G_1`.

    The plain sequential product, slow and easy to read: what :func:`rotate` must equal.

    Args:
        rotations: the sequence, with coordinates below ``size``.
        size: number of coordinates, at least 2.

    Returns:
        ``(size, size)`` of the dtype of the angles.

    Raises:
        ValueError: if ``size < 2`` or a coordinate that is not traced is outside ``[0, size)``.

    Example:
        >>> import jax
        >>> from eoi_jax import givens, rotation
        >>> turn = givens.from_pairs(jax.random.key(0), [(0, 1)], angles=0.5)
        >>> rotation.as_matrix(turn, size=2).round(2)
        Array([[ 0.88,  0.48],
               [-0.48,  0.88]], dtype=float32)
    """
    size = checks.integer(size, low=2, name="size")
    checks.rotations(rotations, size)
    return _multiply_out(rotations, size)


def rotate_rows(
    rows: Array,
    rotations: Rotations,
    wave: Array,
    *,
    count: Array | int | None = None,
    round_products: bool = False,
) -> Array:
    """Rotate the rows of a 2-D array by the first ``count`` rotations, given their waves.

    ``round_products`` rounds each product before the sum, as :func:`count_gained` does.
    """
    size, columns = rows.shape

    def step(rows: Array, block: Block) -> Array:
        both, turned = _turn(rows, block, round_products)
        return rows.at[both].set(turned, mode="drop", unique_indices=True)

    return scan_waves(step, rows, rotations, wave, size=size, columns=columns, count=count)


def count_gained(rows: Array, rotations: Rotations, wave: Array) -> tuple[Array, Array]:
    """Rotate rows; return them and the non-zeros that each rotation added, counted on the floats.

    Angles that recur cancel entries to exact zeros, so for them the integers of
    :func:`eoi_jax.givens.support` are only an upper bound.
    """
    size, columns = rows.shape

    def step(carry: tuple[Array, Array], block: Block) -> tuple[Array, Array]:
        rows, gained = carry
        both, turned = _turn(rows, block, True)
        before = jnp.count_nonzero(rows.at[both].get(mode="clip"), axis=1)
        change = (jnp.count_nonzero(turned, axis=1) - before).reshape(2, -1).sum(axis=0)
        rows = rows.at[both].set(turned, mode="drop", unique_indices=True)
        gained = gained.at[block.position].set(
            change.astype(jnp.int32), mode="drop", unique_indices=True
        )
        return rows, gained

    carry = (rows, jnp.zeros(wave.shape, jnp.int32))
    return scan_waves(step, carry, rotations, wave, size=size, columns=columns)


@functools.partial(jax.jit, static_argnames=("axis", "dtype"))
def _rotate(matrix: Array, rotations: Rotations, axis: int, dtype: DType) -> Array:
    front = jnp.moveaxis(matrix, axis, 0)
    size = front.shape[0]
    rows = front.reshape(size, -1).astype(checks.compute_dtype(dtype))
    rows = rotate_rows(rows, rotations, givens.waves(rotations, size))
    return jnp.moveaxis(rows.reshape(front.shape).astype(dtype), 0, axis)


@functools.partial(jax.jit, static_argnames="size")
def _multiply_out(rotations: Rotations, size: int) -> Array:
    def step(matrix: Array, rotation: Rotations) -> tuple[Array, None]:
        i, j, theta = rotation
        cos, sin = jnp.cos(theta), jnp.sin(theta)
        turned_i = cos * matrix[i] + sin * matrix[j]
        turned_j = -sin * matrix[i] + cos * matrix[j]
        return matrix.at[i].set(turned_i).at[j].set(turned_j), None

    return jax.lax.scan(step, jnp.eye(size, dtype=rotations.theta.dtype), rotations)[0]


def _turn(rows: Array, block: Block, round_products: bool) -> tuple[Array, Array]:
    """Rows that a block touches, first all ``i`` then all ``j``, and what they become."""
    both = jnp.concatenate([block.i, block.j])
    other = jnp.concatenate([block.j, block.i])
    theta = block.theta.astype(rows.dtype)
    cos = jnp.tile(jnp.cos(theta), 2)[:, None]
    sin = jnp.concatenate([jnp.sin(theta), -jnp.sin(theta)])[:, None]
    own = cos * rows.at[both].get(mode="clip")
    others = sin * rows.at[other].get(mode="clip")
    if round_products:
        # A fused multiply-add leaves the rounding error of one product where two equal ones cancel.
        # Flushing subnormal products stands between the two operations and keeps them apart; an
        # optimization barrier does not, since XLA drops it before it fuses.
        tiny = jnp.finfo(rows.dtype).tiny
        own = jnp.where(jnp.abs(own) < tiny, 0, own)
        others = jnp.where(jnp.abs(others) < tiny, 0, others)
    return both, own + others
