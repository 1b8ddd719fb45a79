"""Haar matrices: uniform among all orthogonal ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax._internal.vmap import varying_as
from eoi_jax.typing import Array

__all__ = ["haar", "haar_by_reflections"]


def haar(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw matrices ``(..., n, m)`` uniform among those with orthonormal rows or columns."""
    *batch, rows, columns = shape
    tall = (*batch, max(rows, columns), min(rows, columns))
    q, r = jnp.linalg.qr(jax.random.normal(key, tall, dtype))
    # The signs that QR chooses are not random; a positive diagonal of R makes Q uniform. A zero
    # on it, which a 1 x 1 matrix meets once in ten million draws, must not become a zero of Q.
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(dtype)
    q = q * signs[..., None, :]
    return q if rows >= columns else jnp.swapaxes(q, -2, -1)


def haar_by_reflections(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    r"""Draw square matrices ``(..., n, n)`` of the Haar measure, many small ones at once.

    The product of the reflections :math:`H_1 \cdots H_n` that turn Gaussian vectors of the lengths
    :math:`n, n - 1, \dots, 1` into multiples of their first unit vectors, with signs. All matrices
    take a step at the same time, so it suits accelerators, on which a batch of decompositions runs
    one by one; and CPUs, where batches of them in one program have waited for each other forever.

    Reference:
        Stewart, "The efficient generation of random orthogonal matrices", SIAM Journal on Numerical
        Analysis 17 (1980).
    """
    size = shape[-1]
    vectors = jnp.triu(jax.random.normal(key, shape, dtype))  # row j has length n - j
    signs = jnp.where(jnp.diagonal(vectors, axis1=-2, axis2=-1) < 0, -1, 1).astype(dtype)
    norms = jnp.linalg.norm(vectors, axis=-1)
    unit = jnp.broadcast_to(jnp.eye(size, dtype=dtype), shape)
    normals = vectors + (signs * norms)[..., None] * unit
    lengths = jnp.linalg.norm(normals, axis=-1, keepdims=True)
    normals = normals / jnp.where(lengths > 0, lengths, 1)

    def reflect(step: Array, q: Array) -> Array:
        normal = jax.lax.dynamic_index_in_dim(normals, size - 1 - step, -2)
        along = jnp.matmul(normal, q, precision=jax.lax.Precision.HIGHEST)
        return q - 2 * normal.swapaxes(-1, -2) * along

    return jax.lax.fori_loop(0, size, reflect, varying_as(-signs[..., None] * unit, key))
