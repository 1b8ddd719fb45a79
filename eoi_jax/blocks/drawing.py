"""Exactly orthogonal block-sparse matrices, drawn without forming a dense matrix."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eoi_jax._internal import checks
from eoi_jax._internal.haar import haar_by_reflections
from eoi_jax._internal.keys import threefry_key
from eoi_jax.blocks.format import BlockSparse, _check_shape, _invert
from eoi_jax.typing import Array, DType

__all__ = ["orthogonal"]


def orthogonal(
    key: Array,
    shape: tuple[int, int],
    density: float,
    *,
    block_size: int,
    scale: float | Array = 1.0,
    dtype: DType = jnp.float32,
) -> BlockSparse:
    r"""Draw an exactly orthogonal matrix whose non-zeros fill whole blocks.

    The method is EOI on blocks. Take the blocks of the longer side as rows. Start with one Haar
    orthogonal block in each row, such that the columns share the blocks evenly. Then a round
    mixes the rows in random groups of :math:`g`, by a Haar :math:`g \times g` matrix (a rotation
    for pairs), and multiplies each new row by a Haar block of its own:

    .. math:: W \leftarrow \operatorname{diag}(Q_1, Q_2, \dots) \, (O \otimes I_b) \, W.

    The blocks of a group's rows are in different columns, so every round multiplies the number of
    blocks in each row and column by exactly :math:`g`. For :math:`k = g_1 g_2 \cdots` (the prime
    factors) every row has :math:`k` blocks, and in a square matrix so does every column. All
    non-zero blocks are orthogonal up to a factor. Rows and columns are permuted at random.

    The rows of a group of the last round have their blocks in the same columns. They are neighbors
    and stored together, in blocks of :math:`b` by :math:`g b`, with which products are faster.

    At a density between those of :math:`k` and :math:`k + 1` blocks in each row, some rows and
    columns have :math:`k` blocks and the others :math:`k + 1`; the former are stored with a block
    of zeros. If there are few blocks, the two numbers may differ by more than one. In these cases
    each block is stored separately.

    Args:
        key: A random key.
        shape: ``(inputs, outputs)``, static, both multiples of ``block_size``.
        density: Fraction of the blocks that are not zero, static, in
            ``[block_size / min(shape), 1]``. The nearest density that can be reached is used.
        block_size: Rows, and columns, of a block.
        scale: The singular value of the result.
        dtype: Real floating dtype of the result. Computed in float32 or wider, cast last.

    Returns:
        A :class:`BlockSparse` with orthonormal rows (columns, if there are more rows), times
        ``scale``.

    Raises:
        ValueError: If the block size does not divide the shape; if the density is out of range,
            traced, or more than a tenth away from every density that can be reached; for a bad
            ``scale``, ``dtype`` or key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import eoi_jax as eoi
        >>> w = eoi.blocks.orthogonal(jax.random.key(0), (512, 512), 1 / 8, block_size=32)
        >>> dense = w.to_dense()
        >>> bool(jnp.allclose(dense @ dense.T, jnp.eye(512), atol=1e-5)), float((dense != 0).mean())
        (True, 0.125)

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, for single entries. The
        extension to blocks is from this library.
    """
    key = threefry_key(key)
    blocks = _check_shape(shape, block_size, block_size)
    dtype = checks.float_dtype(dtype)
    scale = checks.scale(scale, dtype)
    parts = _plan(max(blocks), min(blocks), density)
    return _draw(
        key, jnp.asarray(scale, checks.compute_dtype(dtype)), blocks, parts, block_size, dtype
    )


class _Part(NamedTuple):
    """A part of a matrix that shares no row or column with the others: its size in blocks."""

    rows: int
    columns: int
    per_row: int


def _plan(rows: int, columns: int, density: Any) -> tuple[_Part, ...]:
    """Divide ``rows >= columns`` blocks into one or two parts, nearest to a density."""
    if checks.is_traced(density):
        remedy = "It decides shapes: give a float, or mark it as static for jit."
        raise checks.value_error("density", density, "is traced", remedy)
    why = "Every row and column has at least one block; smaller blocks reach lower densities."
    density = float(checks.density(density, minimum=1 / columns, why=why))
    target = density * columns
    low = max(1, min(math.floor(target), columns))
    ways = _divisions(rows, columns, low, low + 1) + _divisions(rows, columns, low + 1, low + 1)
    if _error(ways, target) > 0.1 * target:  # few blocks: parts that differ more
        pairs = itertools.combinations_with_replacement(range(1, columns + 1), 2)
        ways = [way for pair in pairs for way in _divisions(rows, columns, *pair)]
    if _error(ways, target) > 0.1 * target:
        reached = sorted({_mean(way) / columns for way in ways})
        around = [
            *[d for d in reached if d < density][-1:],
            *[d for d in reached if d > density][:1],
        ]
        raise checks.value_error(
            "density",
            density,
            f"is more than a tenth from what {rows} x {columns} blocks can have",
            f"The nearest are {' and '.join(f'{d:g}' for d in around)}; smaller blocks have more.",
        )
    return min(ways, key=lambda way: (abs(_mean(way) - target), way[-1].per_row, len(way)))


def _mean(way: tuple[_Part, ...]) -> float:
    return sum(part.rows * part.per_row for part in way) / sum(part.rows for part in way)


def _error(ways: list[tuple[_Part, ...]], target: float) -> float:
    return min((abs(_mean(way) - target) for way in ways), default=math.inf)


def _divisions(rows: int, columns: int, k: int, more: int) -> list[tuple[_Part, ...]]:
    """Return the ways to give some rows and columns ``k`` blocks, and the others ``more``."""
    found: list[tuple[_Part, ...]] = []
    if rows % k == 0 and columns % k == 0:
        found.append((_Part(rows, columns, k),))
    if k == more:
        return found
    for first in range(k, columns, k):
        rest = columns - first
        tops = [
            top
            for top in range(k, rows, k)
            if rest % more == 0 == (rows - top) % more and top >= first and rows - top >= rest
        ]
        if tops:  # as many rows to a column in both parts as divisibility allows
            top = min(tops, key=lambda top: abs(top / first - (rows - top) / rest))
            found.append((_Part(top, first, k), _Part(rows - top, rest, more)))
    return found


def _factors(number: int) -> list[int]:
    """Return the prime factors, increasing."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found


@functools.partial(jax.jit, static_argnames=("blocks", "parts", "size", "dtype"))
def _draw(
    key: Array,
    scale: Array,
    blocks: tuple[int, int],
    parts: tuple[_Part, ...],
    size: int,
    dtype: Any,
) -> BlockSparse:
    inputs, outputs = blocks
    long, short = max(blocks), min(blocks)
    for_rows, for_columns, *for_parts = jax.random.split(key, 2 + len(parts))
    most = max(part.per_row for part in parts)
    together = _together(parts)
    columns, values, first = [], [], 0
    for part_key, part in zip(for_parts, parts, strict=True):
        of_part, drawn = _rounds(part_key, part, size, scale.dtype)
        of_part, drawn = _joined(of_part, drawn, together)
        missing = ((0, 0), (0, most - part.per_row))
        columns.append(jnp.pad(of_part + first, missing, constant_values=short))
        values.append(jnp.pad(drawn, (*missing, (0, 0), (0, 0))))
        first += part.columns
    order = jax.random.permutation(for_rows, long // together)
    renamed = jnp.append(jax.random.permutation(for_columns, short), short)
    index = renamed[jnp.concatenate(columns)[order]].astype(jnp.int32)
    stored = scale * jnp.concatenate(values)[order]
    sorting = jnp.argsort(index, axis=1)
    index = jnp.take_along_axis(index, sorting, 1)
    stored = jnp.take_along_axis(stored, sorting[..., None, None], 1)
    degree = max(part.per_row * -(-part.rows // part.columns) for part in parts) // together
    # Rows are blocks of outputs, and their blocks stand as (outputs, inputs).
    matrix = BlockSparse(stored.swapaxes(-1, -2), index, _invert(index, short, degree))
    if inputs > outputs:
        matrix = matrix.T
    return BlockSparse(matrix.values.astype(dtype), matrix.rows, matrix.slots)


def _together(parts: tuple[_Part, ...]) -> int:
    """Return how many rows met in the last round, 1 if that differs from part to part."""
    last = {_factors(part.per_row)[-1] if part.per_row > 1 else 1 for part in parts}
    return last.pop() if len(last) == 1 else 1


def _joined(index: Array, blocks: Array, together: int) -> tuple[Array, Array]:
    """Join the rows that met in the last round: ``(R / g, k)`` and ``(R / g, k, g * b, b)``."""
    rows, per, size, _ = blocks.shape
    met = blocks.reshape(together, rows // together, per, size, size)
    joined = jnp.moveaxis(met, 0, 2).reshape(rows // together, per, together * size, size)
    return index[: rows // together], joined


def _rounds(key: Array, part: _Part, size: int, dtype: Any) -> tuple[Array, Array]:
    """Draw one part: the column of each block ``(rows, k)``, and blocks ``(rows, k, b, b)``."""
    rows, columns, k = part
    groups = _factors(k)
    for_blocks, for_orders, for_mixing = jax.random.split(key, 3)
    # All rounds draw at once: most of the time to compile is that of random numbers.
    turns = haar_by_reflections(for_blocks, (1 + len(groups), rows, size, size), dtype)
    orders = jax.random.uniform(for_orders, (len(groups), rows))
    mixings = _mixings(for_mixing, groups, rows, dtype)
    # Rows, and columns alike, are k classes of equal size. In round j only rows meet that differ in
    # the j-th digit of the class and agree in the later ones: no two see one column.
    place = jnp.arange(rows).reshape(k, rows // k)
    of_class = place % (rows // k) % (columns // k)
    index = (jnp.arange(k)[:, None] * (columns // k) + of_class).reshape(rows, 1)
    copies = jnp.bincount(index[:, 0], length=columns)
    blocks = turns[0][:, None] / jnp.sqrt(copies[index].astype(dtype))[..., None, None]
    later = k
    rounds = zip(groups, orders, mixings, turns[1:], strict=True)
    for group, random, mixing, turn in rounds:
        later //= group
        members, per = rows // (later * group), index.shape[1]
        order = jnp.argsort(random.reshape(later * group, members), axis=1)
        order = (order + members * jnp.arange(later * group)[:, None]).reshape(-1, group, members)
        order = order.swapaxes(1, 2)  # (later, members, group): the rows that meet
        met = index[order].reshape(later, members, 1, group * per)
        index = jnp.broadcast_to(met, (later, members, group, group * per))
        # Row i of a group: all blocks of its rows j, times mixing[i, j].
        mixing = mixing.reshape(later, members, group, group, 1, 1, 1)
        turn = turn.reshape(later, members, group, size, size)
        blocks = jnp.einsum(
            "lmgab,lmgjkbc->lmgjkac",
            turn,
            mixing * blocks[order][:, :, None],
            precision=jax.lax.Precision.HIGHEST,
        )
        # The next digit's classes are groups of rows side by side.
        index = index.swapaxes(1, 2).reshape(rows, group * per)
        blocks = blocks.swapaxes(1, 2).reshape(rows, group * per, size, size)
    return index, blocks


def _mixings(key: Array, groups: list[int], rows: int, dtype: Any) -> list[Array]:
    """Draw the orthogonal matrices that mix each round's groups of rows, rotations for pairs."""
    for_angles, *for_groups = jax.random.split(key, 1 + len(groups))
    angles = jax.random.uniform(for_angles, (len(groups), rows // 2), dtype, maxval=2 * math.pi)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)
    return [
        pair if group == 2 else haar_by_reflections(round_key, (rows // group, group, group), dtype)
        for round_key, group, pair in zip(for_groups, groups, pairs, strict=True)
    ]
