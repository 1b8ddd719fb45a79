"""Counts, and the selection of exactly so many entries by a threshold, never by sorting.

The threshold is the ``count``-th largest key. It is found bit by bit from the highest, with one
count over the keys for each bit: 16 million keys take 32 such passes, and sorting them takes 20
times as long. The keys may lie in several arrays, which are counted one after the other and never
put together. Equal keys at the threshold are taken in order: earlier arrays first, and within an
array lower indices first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax._internal.vmap import varying_as
from eoi_jax.typing import Array

# Counts are int32: this many entries at most in all the arrays of one selection.
MAX_SIZE = 2**31 - 1


def target_count(density: Any, size: int) -> Any:
    """Round ``density * size`` half up: in float64 on the host unless the density is traced."""
    if checks.is_traced(density):
        # ``size`` itself caps the product: float32 has no 2^24 + 1.
        product = jnp.floor(density * size + 0.5)
        return jnp.minimum(product.astype(jnp.int32), size)
    return np.floor(np.asarray(density, np.float64) * size + 0.5).astype(np.int64)


def round_to_total(quotas: Any, sizes: Any, total: int) -> Any:
    """Round quotas down, then as many of the largest remainders up as the total asks for.

    NumPy arrays of float64 and int64; no count exceeds its size.
    """
    counts = np.minimum(np.floor(quotas), sizes).astype(np.int64)
    # Remainders that differ by less than float64 can tell are equal, and go in order.
    order = np.argsort(np.round(counts - quotas, 6), kind="stable")
    with_room = order[counts[order] < sizes[order]]
    counts[with_room[: total - counts.sum()]] += 1
    return counts


def count(leaf: Any) -> Any:
    """Count the True entries: exactly, on the host unless the leaf is being traced."""
    if checks.is_traced(leaf):
        return jnp.sum(leaf, dtype=jnp.int32)
    return int(np.count_nonzero(leaf))


def fraction(counts: Sequence[Any], sizes: Sequence[Any]) -> float | Array:
    """Divide the sum of counts by the sum of sizes: in float64 unless traced. 0 / 0 is 1."""
    if not any(map(checks.is_traced, (*counts, *sizes))):
        return sum(counts) / sum(sizes) if sum(sizes) else 1.0
    # Numbers add up as floats: the total of a large network overflows 32-bit integers.
    part, whole = (
        sum(jnp.asarray(number, jnp.float32) for number in numbers) for numbers in (counts, sizes)
    )
    return jnp.where(whole > 0, part / jnp.maximum(whole, 1.0), 1.0)


def map_rows(
    select: Callable[[int, Array, Any], Array], tree: Any, densities: Sequence[Any]
) -> Any:
    """Map ``select(leaf index, rows, counts)`` over a tree of kernels: a count for each row.

    ``densities`` has a number, or one for each slice of its leading axes, for each leaf. Other
    leaves stay as they are if they are masks; scores become True.
    """
    leaves, treedef = jax.tree.flatten(tree)
    out = []
    for index, (leaf, density) in enumerate(zip(leaves, densities, strict=True)):
        if np.ndim(leaf) == 0 or leaf.size == 0:
            is_mask = jnp.result_type(leaf) == jnp.bool_
            out.append(leaf if is_mask else jnp.ones(np.shape(leaf), bool))
            continue
        num_rows = math.prod(np.shape(density))
        rows = jnp.reshape(leaf, (num_rows, leaf.size // num_rows))
        counts = target_count(density, rows.shape[1])
        # On the host unless traced: they are compared with counts while a program is traced.
        numpy: Any = jnp if checks.is_traced(counts) else np
        counts = numpy.reshape(counts, (num_rows,)).astype(np.int32)
        out.append(select(index, rows, counts).reshape(leaf.shape))
    return jax.tree.unflatten(treedef, out)


def ordered_bits(values: Array) -> Array:
    """Map floats to unsigned integers of their width that compare as the floats do.

    The order is total: NaN of either sign below everything, then -inf, ..., -0 = 0, ..., inf.
    Subnormal numbers keep their places, also on devices whose arithmetic flushes them to zero.
    ``values`` are float16, bfloat16, float32 or float64.
    """
    unsigned = np.dtype(f"uint{8 * values.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(values, unsigned)
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    magnitude = bits & ~sign
    infinity = np.asarray(np.inf, values.dtype).view(unsigned)[()]
    # Larger magnitudes of negative numbers come first: all their bits are flipped.
    ordered = jnp.where((bits & sign == 0) | (magnitude == 0), magnitude | sign, ~bits)
    return jnp.where(magnitude > infinity, unsigned.type(0), ordered)


@jax.jit
def largest(scores: Sequence[Array], count: Any) -> list[Array]:
    """Select exactly ``count`` entries of several flat float arrays, the largest; ties in order.

    Arrays of several dtypes are compared in the dtype to which they promote. NaN is the lowest of
    all (see :func:`ordered_bits`). ``count`` may be traced; it is an integer in [0, total].
    """
    if not scores:
        return []
    with jax.numpy_dtype_promotion("standard"):  # the casts below are explicit
        dtype = reduce(jnp.promote_types, (leaf.dtype for leaf in scores))
    keys = [ordered_bits(leaf.astype(dtype)) for leaf in scores]
    return _select(keys, [True] * len(keys), jnp.asarray(count, jnp.int32))


def largest_of_tree(scores: Any, count: Any) -> Any:
    """Select the ``count`` largest entries of a tree's arrays; a leaf without axes is True."""
    leaves, treedef = jax.tree.flatten(scores)
    kept = iter(largest([jnp.ravel(leaf) for leaf in leaves if np.ndim(leaf) > 0], count))
    return jax.tree.unflatten(
        treedef,
        [next(kept).reshape(leaf.shape) if np.ndim(leaf) else jnp.array(True) for leaf in leaves],
    )


@jax.jit
@jax.vmap
def largest_rows(scores: Array, count: Array) -> Array:
    """Select exactly ``count[r]`` entries of each row ``r``, the largest; ties by index."""
    return _select([ordered_bits(scores)], [True], count)[0]


def smallest(values: Array, eligible: Array, count: Array) -> Array:
    """Select exactly ``count`` of the eligible unsigned values, the smallest; ties by index.

    All eligible values are selected if they are fewer, and none if ``count`` is negative.
    """
    return _select([~values], [eligible], count)[0]


@jax.jit
@jax.vmap
def unmask_rows(key: Array, row: Array, count: Array) -> Array:
    """Unmask random masked entries of each row until ``count[r]`` of row ``r`` are unmasked."""
    missing = count - jnp.sum(row, dtype=jnp.int32)
    return row | smallest(jax.random.bits(key, row.shape, jnp.uint32), ~row, missing)


def _select(keys: Sequence[Array], eligible: Sequence[Any], count: Array) -> list[Array]:
    """Select exactly ``count`` of the eligible unsigned keys, the largest; ties in order."""
    bits = 8 * keys[0].dtype.itemsize
    one = jnp.ones((), keys[0].dtype)

    def bit_by_bit(step: Array, low: Array) -> Array:
        candidate = low | (one << jnp.asarray(bits - 1 - step, low.dtype))
        at_least = [
            jnp.sum(allowed & (leaf >= candidate), dtype=jnp.int32)
            for leaf, allowed in zip(keys, eligible, strict=True)
        ]
        return jnp.where(sum(at_least) >= count, candidate, low)

    start = varying_as(jnp.zeros_like(one), keys, eligible, count)
    threshold = jax.lax.fori_loop(0, bits, bit_by_bit, start)
    above = [a & (leaf > threshold) for leaf, a in zip(keys, eligible, strict=True)]
    ties = [a & (leaf == threshold) for leaf, a in zip(keys, eligible, strict=True)]
    left = count - sum(jnp.sum(leaf, dtype=jnp.int32) for leaf in above)
    selected = []
    for leaf_above, leaf_ties in zip(above, ties, strict=True):
        num_ties = jnp.sum(leaf_ties, dtype=jnp.int32)
        # Most often one key is at the threshold and is taken: the cumulative sum, which costs
        # as much as ten passes and 12 bytes an entry, is spared.
        chosen = jax.lax.cond(left >= num_ties, lambda t, n: t, _first, leaf_ties, left)
        selected.append(leaf_above | chosen)
        left = jnp.maximum(left - num_ties, 0)
    return selected


def _first(ties: Array, number: Array) -> Array:
    """Keep the first ``number`` True entries."""
    return ties & (jnp.cumsum(ties, dtype=jnp.int32) <= number)
