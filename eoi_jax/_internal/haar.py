"""Haar matrices: uniform among all orthogonal ones."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eoi_jax.typing import Array

__all__ = ["haar"]


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
