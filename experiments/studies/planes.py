"""Sparse orthogonal matrices by rotations in planes of a pattern, to study what the planes do.

The planes of EOI are independent and uniform. Here they are drawn uniformly from a list instead,
and only coordinates that the list connects ever mix:

============= =====================================================================================
pattern       planes
============= =====================================================================================
``banded``    coordinates at a distance of at most 8, on the line
``butterfly`` coordinates that differ in one bit, as in the fast Fourier transform
============= =====================================================================================
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eoi_jax as eoi
from eoi_jax import givens, rotation
from eoi_jax.typing import Array, Densities, LayoutOf, Params

__all__ = ["PATTERNS", "orthogonal", "planes", "start"]

_BAND = 8
_IN_PATTERN: dict[str, Callable[[Any, Any], Any]] = {
    "banded": lambda i, j: j - i <= _BAND,
    "butterfly": lambda i, j: np.bitwise_count(i ^ j) == 1,
}
PATTERNS = tuple(_IN_PATTERN)
# Enough for every density of the experiments. A band takes the most to spread a short side's few
# non-zeros over the long one.
_PER_COORDINATE = 32


def planes(pattern: str, size: int) -> np.ndarray:
    """Return the planes of a pattern.

    Args:
        pattern: One of :data:`PATTERNS`.
        size: Number of coordinates, at least 2.

    Returns:
        ``(planes, 2)`` int32, the lower coordinate first.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is outside {PATTERNS}. Choose one of them.")
    i, j = np.triu_indices(size, 1)
    inside = _IN_PATTERN[pattern](i, j)
    return np.stack([i[inside], j[inside]], axis=1).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("shape", "pattern"))
def orthogonal(
    key: Array, shape: tuple[int, int], count: Array, *, pattern: str, scale: float = 1.0
) -> Array:
    """Draw a matrix by rotations in planes of a pattern, with at most ``count`` non-zeros.

    Args:
        key: A PRNG key.
        shape: Rows and columns.
        count: Non-zeros, at least the shorter side; it may be traced.
        pattern: One of :data:`PATTERNS`.
        scale: Factor of the result.

    Returns:
        A float32 array with orthonormal rows or columns, times ``scale``.
    """
    size = max(shape)
    options = planes(pattern, size)
    for_planes, for_angles = jax.random.split(key)
    number = _PER_COORDINATE * size
    pairs = jnp.asarray(options)[jax.random.randint(for_planes, (number,), 0, len(options))]
    rotations = givens.from_pairs(for_angles, pairs)
    # Counts never fall, so the rotations that fit are a prefix.
    fits = givens.num_nonzeros(rotations, shape)[1:] <= jnp.asarray(count).astype(jnp.uint32)
    turned = rotations._replace(theta=jnp.where(fits, rotations.theta, 0))
    tall = jnp.eye(size, min(shape)) * scale
    matrix = rotation.rotate(tall, turned, axis=0)
    return matrix if shape[0] >= shape[1] else matrix.T


def start(
    key: Array,
    params: Params,
    densities: Densities,
    *,
    pattern: str,
    scale: float = 1.0,
    layout: LayoutOf,
) -> eoi.SparseInit:
    """Draw the kernels of a network of linear layers, as :func:`eoi_jax.exact_orthogonal` does.

    Args:
        key: A PRNG key.
        params: Those of the network; biases are kept.
        densities: Those of each kernel or stack of kernels, at least ``1 / max(shape)``.
        pattern: One of :data:`PATTERNS`.
        scale: Factor of the kernels.
        layout: Which axes stack layers.

    Returns:
        Weights, and masks with the exact counts of the densities: the support, and zeros drawn at
        random among all others.
    """
    for_weights, for_mask = jax.random.split(key)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    drawn = []
    pairs = zip(leaves, jax.tree.leaves(densities), strict=True)
    for number, ((path, leaf), density) in enumerate(pairs):
        if not eoi.masks.is_kernel(path, leaf):
            drawn.append(leaf)
            continue
        if leaf.ndim - layout(path, leaf).batch_axes != 2:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {leaf.shape}, which is neither a "
                "matrix nor a stack. Use planes='independent' for a network with convolutions."
            )
        weights = _stack(jax.random.fold_in(for_weights, number), leaf, density, pattern, scale)
        drawn.append(weights)
    tree = jax.tree.unflatten(structure, drawn)
    mask = eoi.masks.fill(for_mask, eoi.masks.support(tree), densities)
    return eoi.SparseInit(tree, mask)


def _stack(key: Array, leaf: Array, density: Any, pattern: str, scale: float) -> Array:
    """Draw all matrices of one leaf."""
    shape = leaf.shape[-2:]
    number = math.prod(leaf.shape[:-2])
    counts = jnp.rint(jnp.broadcast_to(jnp.ravel(density), number) * math.prod(shape))

    def draw(key_and_count: tuple[Array, Array]) -> Array:
        matrix_key, count = key_and_count
        return orthogonal(matrix_key, shape, count, pattern=pattern, scale=scale)

    weights = jax.lax.map(draw, (jax.random.split(key, number), counts))
    return weights.reshape(leaf.shape).astype(leaf.dtype)
