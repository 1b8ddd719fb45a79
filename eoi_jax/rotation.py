"""Applying a sequence of Givens rotations to an array, wave by wave."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from eoi_jax import givens
from eoi_jax._internal import checks
from eoi_jax._internal.waves import rotate_rows
from eoi_jax.givens import Rotations
from eoi_jax.typing import Array, DType

__all__ = ["as_matrix", "rotate"]


def rotate(matrix: Array, rotations: Rotations, *, axis: int = -1) -> Array:
    r"""Apply a sequence of rotations to the vectors along one axis.

    With :math:`G = G_T \cdots G_1` every vector :math:`a` along ``axis`` becomes :math:`G a`; for
    a matrix, ``axis=0`` gives :math:`G W` and ``axis=1`` gives :math:`W G^\top`. Disjoint rotations
    are applied at once, without copies, at a cost of 4 multiplications for each rotation and
    vector. The result equals that of the sequential product.

    Args:
        matrix: ``(..., size, ...)`` floating array with ``size >= 2`` along ``axis``.
        rotations: The sequence, with coordinates below ``size``.
        axis: The axis of the coordinates.

    Returns:
        An array of the shape and dtype of ``matrix``; narrower dtypes than float32 are rotated in
        float32 and cast last.

    Raises:
        ValueError: If ``matrix`` is not floating, ``axis`` is out of range, the axis is shorter
            than 2, or (where they are not traced) a coordinate is outside ``[0, size)``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from eoi_jax import givens, rotation
        >>> turns = givens.sample(jax.random.key(0), size=6, num_rotations=20)
        >>> w = rotation.rotate(jnp.eye(6), turns, axis=0)
        >>> bool(jnp.allclose(w @ w.T, jnp.eye(6), atol=1e-6))
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, section 4.1.
    """
    matrix = checks.array(matrix, "matrix")
    dtype = checks.float_dtype(matrix.dtype, name="matrix.dtype")
    axis = checks.axis(axis, matrix.ndim)
    size = checks.integer(
        matrix.shape[axis],
        low=2,
        name=f"matrix.shape[{axis}]",
        remedy="A plane takes two coordinates.",
    )
    rotations = Rotations(*checks.rotations(rotations, size))
    return _rotate(matrix, rotations, axis, dtype)


def as_matrix(rotations: Rotations, size: int) -> Array:
    r"""Return the product of a sequence, :math:`G_T \cdots G_1`, one rotation after another.

    This plain sequential product is slow and easy to read. :func:`rotate` has to agree with it.

    Args:
        rotations: The sequence, with coordinates below ``size``.
        size: Number of coordinates, at least 2.

    Returns:
        ``(size, size)`` of the dtype of the angles.

    Raises:
        ValueError: If ``size < 2`` or a coordinate that is not traced is outside ``[0, size)``.

    Example:
        >>> import jax
        >>> from eoi_jax import givens, rotation
        >>> turn = givens.from_pairs(jax.random.key(0), [(0, 1)], angles=0.5)
        >>> rotation.as_matrix(turn, size=2).round(2)
        Array([[ 0.88,  0.48],
               [-0.48,  0.88]], dtype=float32)

    Reference:
        Golub and Van Loan, "Matrix Computations", fourth edition, Johns Hopkins University Press
        2013, section 5.1.
    """
    size = checks.integer(size, low=2, name="size")
    rotations = Rotations(*checks.rotations(rotations, size))
    return _multiply_out(rotations, size)


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
