"""Counts, and the selection of exactly so many entries by a threshold, never by sorting.

The threshold is the ``count``-th largest key. It is found digit by digit from the highest, eight
bits at a time, with one histogram of 256 counts over the keys for each digit: four passes for keys
of 32 bits. The keys may lie in several arrays of any shape, which are counted one after the other
and never put together or flattened. Arrays that are spread over devices are counted where they
are: each device contributes its histogram and nothing else is exchanged. Equal keys at the
threshold are taken in order, earlier arrays first and within an array lower indices first; where
not all of them are taken, the last index that is taken is found by the same search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks, shardings
from eoi_jax._internal.keys import wrapped
from eoi_jax._internal.vmap import varying_as
from eoi_jax.typing import Array

# Counts are int32: this many entries at most in all the arrays of one selection.
MAX_SIZE = 2**31 - 1


def target_count(density: Any, size: int) -> Any:
    """Round ``density * size`` half up: in float64 on the host unless the density is traced."""
    if checks.is_traced(density):
        # ``size`` itself caps the product: float32 has no 2^24 + 1, and float16 no 2^16.
        product = jnp.floor(checks.widened(density) * size + 0.5)
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


def map_layers(
    select: Callable[[int, Array, Any], Array], tree: Any, densities: Sequence[Any]
) -> Any:
    """Map ``select(leaf index, leaf, counts)`` over a tree of kernels.

    ``densities`` has for each leaf a number, or one for each slice of the leaf's leading axes;
    ``counts`` has their shape. Leaves without entries or axes stay as they are if they are masks;
    scores become True.
    """
    leaves, treedef = jax.tree.flatten(tree)
    out = []
    for index, (leaf, density) in enumerate(zip(leaves, densities, strict=True)):
        if np.ndim(leaf) == 0 or leaf.size == 0:
            is_mask = jnp.result_type(leaf) == jnp.bool_
            out.append(leaf if is_mask else jnp.ones(np.shape(leaf), bool))
            continue
        counts = target_count(density, math.prod(leaf.shape[np.ndim(density) :]))
        # On the host unless traced: they are compared with counts while a program is traced.
        numpy: Any = jnp if checks.is_traced(counts) else np
        out.append(select(index, jnp.asarray(leaf), numpy.asarray(counts, np.int32)))
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
    """Select exactly ``count`` entries of several float arrays, the largest; ties in order.

    Arrays of several dtypes are compared in the dtype to which they promote. NaN is the lowest of
    all (see :func:`ordered_bits`). ``count`` may be traced; it is an integer in [0, total].
    """
    if not scores:
        return []
    with jax.numpy_dtype_promotion("standard"):  # the casts below are explicit
        dtype = reduce(jnp.promote_types, (leaf.dtype for leaf in scores))

    def select(scores: Sequence[Array], count: Array) -> list[Array]:
        keys = [ordered_bits(leaf.astype(dtype)) for leaf in scores]
        return _select(keys, [True] * len(keys), count)

    scores = list(scores)
    return shardings.auto(select, out_like=scores)(scores, jnp.asarray(count, jnp.int32))


def largest_of_tree(scores: Any, count: Any) -> Any:
    """Select the ``count`` largest entries of a tree's arrays; a leaf without axes is True."""
    leaves, treedef = jax.tree.flatten(scores)
    kept = iter(largest([jnp.asarray(leaf) for leaf in leaves if np.ndim(leaf) > 0], count))
    return jax.tree.unflatten(
        treedef, [next(kept) if np.ndim(leaf) else jnp.array(True) for leaf in leaves]
    )


@jax.jit
def largest_of_layers(scores: Array, counts: Array) -> Array:
    """Select exactly ``counts[l]`` entries of each layer ``scores[l]``, the largest, ties by index.

    ``counts`` has the leading axes of ``scores`` that stack layers.
    """

    def select(layer: Array, count: Array) -> Array:
        return _select([ordered_bits(layer)], [True], count)[0]

    layers = over_layers(select, counts.ndim)
    return shardings.auto(layers, out_like=scores)(scores, counts)


def smallest(values: Array, eligible: Array, count: Array) -> Array:
    """Select exactly ``count`` of the eligible unsigned values, the smallest; ties by index.

    All eligible values are selected if they are fewer, and none if ``count`` is negative.
    """
    return _select([~values], [eligible], count)[0]


@jax.jit
def unmask_layers(keys: Array, mask: Array, counts: Array) -> Array:
    """Unmask random masked entries of each layer until ``counts[l]`` of layer ``l`` are unmasked.

    ``keys`` and ``counts`` have the leading axes of ``mask`` that stack layers.
    """

    def unmask(key: Array, layer: Array, count: Array) -> Array:
        missing = count - jnp.sum(layer, dtype=jnp.int32)
        return layer | smallest(jax.random.bits(key, layer.shape, jnp.uint32), ~layer, missing)

    return shardings.auto(over_layers(unmask, counts.ndim), out_like=mask)(keys, mask, counts)


def padded_size(size: int) -> int:
    """Return the size to which :func:`unmask_flat` takes a layer padded: one of a few."""
    return max(2**14, 2**16 if size > 2**14 else 0, 1 << (size - 1).bit_length())


@jax.jit
def unmask_flat(keys: Array, mask: Array, counts: Array, size: Array) -> Array:
    """Unmask entries as :func:`unmask_layers` does, of flat layers that are padded.

    One program serves all layers of a padded size. The random bits of an entry are those of its
    index, so the same entries are unmasked as without padding.

    Args:
        keys: The words of one key a layer.
        mask: The layers, ``(layers, padded size)``.
        counts: How many entries of each are to be unmasked.
        size: How many entries of a layer are no padding.
    """
    is_padding = jnp.arange(mask.shape[1], dtype=jnp.int32) >= size

    def unmask(layer: tuple[Array, Array, Array]) -> Array:
        words, mask, count = layer
        missing = count - jnp.sum(mask, dtype=jnp.int32)
        bits = jax.random.bits(wrapped(words), mask.shape, jnp.uint32)
        return mask | smallest(bits, ~(mask | is_padding), missing)

    return jax.lax.map(unmask, (keys, mask, counts))


def over_layers(function: Callable[..., Any], num_axes: int) -> Callable[..., Any]:
    """Map a function of one layer over the leading axes that stack layers.

    They are not merged, since a reshape of an axis that is spread over devices gathers it.
    """
    for _ in range(num_axes):
        function = jax.vmap(function)
    return function


def _select(keys: Sequence[Array], eligible: Sequence[Any], count: Array) -> list[Array]:
    """Select exactly ``count`` of the eligible unsigned keys, the largest; ties in order."""
    threshold, left, num_ties = _threshold(keys, eligible, count)
    ties = [a & (leaf == threshold) for leaf, a in zip(keys, eligible, strict=True)]
    order = _descending(keys)
    # Most often one key is at the threshold and is taken, which spares the second search.
    last = jax.lax.cond(
        (left > 0) & (left < num_ties),
        lambda: _threshold(order, ties, left)[0],
        lambda: varying_as(jnp.zeros((), jnp.uint32), threshold, left, num_ties),
    )
    return [
        (a & (leaf > threshold)) | (tie & (place >= last) & (left > 0))
        for leaf, a, tie, place in zip(keys, eligible, ties, order, strict=True)
    ]


def _threshold(
    keys: Sequence[Array], eligible: Sequence[Any], count: Array
) -> tuple[Array, Array, Array]:
    """Return the ``count``-th largest eligible key, how many of its equals to take, and have."""
    dtype = keys[0].dtype
    bits = 8 * dtype.itemsize

    def next_digit(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        high, left, _ = state  # the digits that are known, and how many keys to take below them
        shift = jnp.asarray(bits - 8 - 8 * step, dtype)
        histogram = varying_as(jnp.zeros(256, jnp.int32), keys, eligible, count)
        for leaf, allowed in zip(keys, eligible, strict=True):
            digits = leaf >> shift
            # Two shifts: one by all the bits, before the first digit, is undefined.
            is_candidate = allowed & ((digits >> dtype.type(8)) == high)
            digit = (digits & dtype.type(255)).astype(jnp.int32)
            ones = is_candidate.astype(jnp.int32)
            histogram = histogram.at[digit].add(ones, mode="promise_in_bounds")
        at_least = jnp.cumsum(histogram[::-1])[::-1]
        digit = jnp.maximum(jnp.sum(at_least >= left, dtype=jnp.int32) - 1, 0)
        left = left - (at_least[digit] - histogram[digit])
        return (high << dtype.type(8)) | digit.astype(dtype), left, histogram[digit]

    zero = jnp.zeros((), jnp.int32)
    start = (jnp.zeros((), dtype), jnp.asarray(count, jnp.int32), zero)
    start = varying_as(start, keys, eligible, count)
    threshold: tuple[Array, Array, Array] = jax.lax.fori_loop(0, bits // 8, next_digit, start)
    return threshold


def _descending(arrays: Sequence[Array]) -> list[Array]:
    """Number the entries of several arrays from 2^32 - 1 downwards, in order."""
    numbered, first = [], 0
    for array in arrays:
        index = jnp.full(array.shape, first, jnp.uint32)
        stride = 1
        for axis in reversed(range(array.ndim)):
            step = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
            index = index + step * jnp.uint32(stride)
            stride *= array.shape[axis]
        numbered.append(~index)
        first += array.size
    return numbered
