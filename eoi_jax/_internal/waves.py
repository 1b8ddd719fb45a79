"""Applying rotations wave by wave: to rows of floats, or to the bit-packed support of rows.

Rotations in disjoint planes commute. A sequence of 12 700 independent planes over 4096 coordinates
falls into about 30 *waves* of disjoint ones, and a loop over short blocks of a wave applies them
all with one gather and one scatter a block, in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal.vmap import varying_as
from eoi_jax.typing import Array

_Carry = TypeVar("_Carry")
_WORD = 32  # bits of a packed support's word
_NOISE = 32  # rounding errors of one product of rotations, in units of the precision


class Block(NamedTuple):
    """A run of disjoint rotations; a lane that holds none has indices past the end of each axis."""

    i: Array
    j: Array
    theta: Array
    position: Array


def assign_waves(i: Array, j: Array, size: int) -> Array:
    """Wave of each plane: one more than the last earlier wave that touches one of its coordinates.

    Solved by relaxation, in as many parallel rounds as there are waves.
    """
    length = i.shape[0]
    if length == 0:
        return jnp.zeros((0,), jnp.int32)
    touched = jnp.concatenate([i, j])  # an array (length, 2) would be padded to 128 lanes on TPUs
    twice = 2 * jnp.arange(length, dtype=jnp.int32)
    order = _stable_argsort(touched, bound=size, index=jnp.concatenate([twice, twice + 1]))
    time, place = order // 2, order % 2 * length + order // 2
    coordinate = touched[place]
    follows = jnp.concatenate([jnp.array([False]), coordinate[1:] == coordinate[:-1]])
    previous = jnp.where(follows, jnp.roll(time, 1), -1)
    previous = jnp.zeros_like(previous).at[place].set(previous, unique_indices=True)
    previous = previous.reshape(2, length)

    def relax(wave: Array) -> Array:
        return 1 + jnp.where(previous < 0, -1, wave[previous]).max(axis=0)

    def unsettled(state: tuple[Array, Array]) -> Array:
        before, now = state
        # No wave exceeds the number of rotations, but those of a plane (i, i) would never settle.
        return (before != now).any() & (now.max() < length)

    start = varying_as(jnp.zeros((length,), jnp.int32), previous)
    return jax.lax.while_loop(unsettled, lambda s: (s[1], relax(s[1])), (start, relax(start)))[1]


def scan_waves(
    step: Callable[[_Carry, Block], _Carry],
    carry: _Carry,
    rotations: Any,
    wave: Array,
    *,
    size: int,
    columns: int,
    count: Array | int | None = None,
    in_order: bool = False,
) -> _Carry:
    """Call ``step(carry, block)`` on blocks of disjoint rotations, in wave order.

    ``rotations`` is the triple ``(i, j, theta)``, over ``size`` coordinates that hold ``columns``
    numbers each; ``count`` keeps only the first ``count`` of the sequence, and ``in_order`` says
    that its waves never fall. Blocks are runs of a wave rather than whole waves because their width
    must be static. The length of the loop is
    not, so the number of waves has no bound.
    """
    length = wave.shape[0]
    if length == 0:
        return carry
    count = length if count is None else count
    wave = jnp.where(jnp.arange(length, dtype=jnp.int32) < count, wave, length)
    ordered = (*rotations, jnp.arange(length, dtype=jnp.int32), wave)
    if not in_order:
        order = _stable_argsort(wave, bound=length + 1)
        ordered = (*(leaf[order] for leaf in rotations), order, wave[order])

    def scan(width: int) -> _Carry:
        return _scan_blocks(step, carry, ordered, count, size=size, width=min(width, length))

    # A core takes short blocks, which stay in its cache and pad little; an accelerator takes
    # whole waves, which fill it.
    return jax.lax.platform_dependent(
        cpu=lambda: scan(min(max(2**13 // max(columns, 1), 32), 128)),
        # Rows of a block are copied, so blocks of long rows are short.
        default=lambda: scan(max(min(size // 2, 1024, 2**21 // max(columns, 1)), 32)),
    )


def eye_support(rows: int, columns: int) -> Array:
    """Bit-packed support of the ``(rows, columns)`` partial identity: ``(rows, words)`` uint32."""
    row = jnp.arange(rows, dtype=jnp.uint32)
    return one_hot_support(jnp.where(row < columns, row, columns), columns)


def one_hot_support(column: Array, columns: int) -> Array:
    """Bit-packed support of one non-zero a row: none in a row whose column is past the end."""
    words = -(-columns // _WORD)
    column = column[:, None].astype(jnp.uint32)
    word = jnp.arange(words, dtype=jnp.uint32)[None, :]
    here = (column // _WORD == word) & (column < columns)
    return jnp.where(here, jnp.uint32(1) << (column % _WORD), jnp.uint32(0))


def unpack_support(packed: Array, columns: int) -> Array:
    """Undo the packing: ``(rows, columns)`` booleans."""
    bits = (packed[:, :, None] >> jnp.arange(_WORD, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(packed), -1)[:, :columns].astype(bool)


def grow_support(
    packed: Array, rotations: Any, wave: Array, *, in_order: bool = False
) -> tuple[Array, Array]:
    """Rotate a bit-packed support; return it and the non-zeros that each rotation added."""
    rows, words = packed.shape

    def step(carry: tuple[Array, Array], block: Block) -> tuple[Array, Array]:
        packed, gained = carry
        left = packed.at[block.i].get(mode="clip")
        right = packed.at[block.j].get(mode="clip")
        both = jnp.concatenate([block.i, block.j])
        union = left | right
        packed = packed.at[both].set(
            jnp.concatenate([union, union]), mode="drop", unique_indices=True
        )
        new = jax.lax.population_count(left ^ right).sum(axis=1, dtype=jnp.uint32)
        return packed, gained.at[block.position].set(new, mode="drop", unique_indices=True)

    gained = jnp.zeros(wave.shape, jnp.uint32)
    start = (packed, gained)
    return scan_waves(step, start, rotations, wave, size=rows, columns=words, in_order=in_order)


def rotate_rows(
    rows: Array,
    rotations: Any,
    wave: Array,
    *,
    count: Array | int | None = None,
    round_products: bool = False,
    in_order: bool = False,
    floor: Array | None = None,
) -> Array:
    """Rotate the rows of a 2-D array by the first ``count`` rotations, given their waves.

    ``round_products`` rounds each product before the sum, as :func:`rotate_and_count` does. With a
    ``floor`` angles are squeezed so that no row's squared norm falls below it.
    """
    size, columns = rows.shape

    def step(rows: Array, block: Block) -> Array:
        both, turned = _turn(rows, block, round_products, floor)
        return rows.at[both].set(turned, mode="drop", unique_indices=True)

    return scan_waves(
        step, rows, rotations, wave, size=size, columns=columns, count=count, in_order=in_order
    )


def rotated_eye(
    scale: Array, column: Array, columns: int, rotations: Any, *, count: Array
) -> Array:
    """Rotate a matrix of one entry ``scale`` a row, or none, by whole rounds of matchings.

    After ``r`` rounds a row has at most ``2**r`` non-zeros, so a round doubles lists of values and
    of their columns, and only their sum touches the matrix: far fewer floats than its rows have.

    Args:
        scale: A scalar, in the dtype of the result.
        column: Where each row has its entry; ``columns`` for a row without.
        columns: Columns of the result.
        rotations: ``(i, j, theta)``; each ``len(column) // 2`` of them are disjoint.
        count: How many of the rotations are applied.
    """
    size = len(column)
    row = jnp.arange(size, dtype=jnp.int32)
    column = column[:, None]
    values = jnp.broadcast_to(scale, (size, 1))
    index = jnp.arange(len(rotations[0]), dtype=jnp.int32)
    angle = jnp.where(index < count, rotations[2].astype(scale.dtype), 0)
    rounds = [leaf.reshape(-1, size // 2) for leaf in (*rotations[:2], angle)]
    for i, j, theta in zip(*rounds, strict=True):
        both, other = jnp.concatenate([i, j]), jnp.concatenate([j, i])
        sines = jnp.concatenate([jnp.sin(theta), -jnp.sin(theta)])
        # Of an odd size one row sits out: it is its own partner, by an angle of zero.
        partner = row.at[both].set(other, unique_indices=True)
        cos = (
            jnp.ones_like(values, shape=size)
            .at[both]
            .set(jnp.tile(jnp.cos(theta), 2), unique_indices=True)
        )
        sin = jnp.zeros_like(cos).at[both].set(sines, unique_indices=True)
        values = jnp.concatenate([cos[:, None] * values, sin[:, None] * values[partner]], axis=1)
        column = jnp.concatenate([column, column[partner]], axis=1)
    return jnp.zeros((size, columns), scale.dtype).at[row[:, None], column].add(values, mode="drop")


def rotate_and_count(
    rows: Array, rotations: Any, wave: Array, *, floor: Array | None = None
) -> tuple[Array, Array]:
    """Rotate rows; return them and the non-zeros that each rotation added, counted on the floats.

    Angles that recur cancel entries to exact zeros, so for them the integers of
    :func:`eoi_jax.givens.support` are only an upper bound.
    """
    size, columns = rows.shape

    def step(carry: tuple[Array, Array], block: Block) -> tuple[Array, Array]:
        rows, gained = carry
        both, turned = _turn(rows, block, True, floor)
        before = jnp.count_nonzero(rows.at[both].get(mode="clip"), axis=1)
        change = (jnp.count_nonzero(turned, axis=1) - before).reshape(2, -1).sum(axis=0)
        rows = rows.at[both].set(turned, mode="drop", unique_indices=True)
        gained = gained.at[block.position].set(
            change.astype(jnp.int32), mode="drop", unique_indices=True
        )
        return rows, gained

    carry = (rows, jnp.zeros(wave.shape, jnp.int32))
    return scan_waves(step, carry, rotations, wave, size=size, columns=columns)


def squeeze_angles(theta: Array, left: Array, right: Array, floor: Array) -> Array:
    r"""Squeeze angles so that rotated pairs of rows keep squared norms of at least ``floor``.

    With :math:`m` the mean of a pair's squared norms, :math:`h` half of their difference and
    :math:`g` the inner product, a rotation by :math:`\theta` makes the squared norms
    :math:`m \pm \rho \cos(2\theta - \varphi)`, where :math:`(h, g)` has the polar coordinates
    :math:`(\rho, \varphi)`. Where :math:`\rho > m - \text{floor}`, the allowed
    :math:`2\theta - \varphi` are those within :math:`\arcsin((m - \text{floor}) / \rho)` of an odd
    multiple of :math:`\pi/2`, and all others are moved there linearly: a uniform angle becomes one
    that is uniform among the allowed. Elsewhere no angle is changed, nor with a floor of 0.
    """
    norms = (left * left).sum(axis=1), (right * right).sum(axis=1)
    mean, half = (norms[0] + norms[1]) / 2, (norms[0] - norms[1]) / 2
    inner = (left * right).sum(axis=1)
    rho, phi = jnp.hypot(half, inner), jnp.arctan2(inner, half)
    is_bound = (floor > 0) & (rho > mean - floor)
    # Rows that already are at the floor may be below it by a rounding error.
    room = jnp.clip((mean - floor) / jnp.where(is_bound, rho, 1), 0, 1)
    from_odd = (2 * theta - phi) % jnp.pi - jnp.pi / 2
    squeezed = theta - from_odd * (0.5 - jnp.arcsin(room) / jnp.pi)
    return jnp.where(is_bound, squeezed, theta)


def _turn(
    rows: Array, block: Block, round_products: bool, floor: Array | None
) -> tuple[Array, Array]:
    """Rows that a block touches, first all ``i`` then all ``j``, and what they become."""
    both = jnp.concatenate([block.i, block.j])
    other = jnp.concatenate([block.j, block.i])
    theta = block.theta.astype(rows.dtype)
    if floor is not None:
        left, right = rows.at[block.i].get(mode="clip"), rows.at[block.j].get(mode="clip")
        theta = squeeze_angles(theta, left, right, floor)
    cos = jnp.tile(jnp.cos(theta), 2)[:, None]
    sin = jnp.concatenate([jnp.sin(theta), -jnp.sin(theta)])[:, None]
    same = cos * rows.at[both].get(mode="clip")
    others = sin * rows.at[other].get(mode="clip")
    if round_products:
        # A fused multiply-add leaves the rounding error of one product where two equal ones cancel.
        # Flushing subnormal products stands between the two operations and keeps them apart; an
        # optimization barrier does not, since XLA drops it before it fuses.
        tiny = jnp.finfo(rows.dtype).tiny
        same = jnp.where(jnp.abs(same) < tiny, 0, same)
        others = jnp.where(jnp.abs(others) < tiny, 0, others)
        # Equal angles give entries that are equal up to rounding: what they cancel to is a zero.
        total = same + others
        noise = _NOISE * jnp.finfo(rows.dtype).eps * jnp.abs(same)
        return both, jnp.where(jnp.abs(total) <= noise, 0, total)
    return both, same + others


def _stable_argsort(values: Array, *, bound: int, index: Array | None = None) -> Array:
    """Indices that sort integers in [0, bound), equal ones in order of their index.

    ``index`` gives each value another index than its place, in [0, length). Sorting one array of
    packed (value, index) words is four times faster on a CPU than sorting pairs; where they do not
    fit 32 bits the pairs are sorted.
    """
    length = values.shape[0]
    index = jnp.arange(length, dtype=jnp.int32) if index is None else index
    if bound * length > 2**32:
        return jax.lax.sort((values, index), num_keys=2)[1]
    packed = values.astype(jnp.uint32) * np.uint32(length) + index.astype(jnp.uint32)
    return (jnp.sort(packed) % np.uint32(length)).astype(jnp.int32)


def _scan_blocks(
    step: Callable[[_Carry, Block], _Carry],
    carry: _Carry,
    ordered: tuple[Array, ...],
    count: Array | int,
    *,
    size: int,
    width: int,
) -> _Carry:
    """Scan rotations that are sorted by wave, ``width`` at a time."""
    length = ordered[0].shape[0]
    # A slice must not run over the end: XLA would move it back, onto rotations already applied.
    padded = [jnp.pad(leaf, (0, width), constant_values=leaf.dtype.type(-1)) for leaf in ordered]
    lane = jnp.arange(width, dtype=jnp.int32)

    def body(state: tuple[Array, _Carry]) -> tuple[Array, _Carry]:
        start, carry = state
        i, j, theta, position, wave = (
            jax.lax.dynamic_slice_in_dim(leaf, start, width) for leaf in padded
        )
        live = wave == wave[0]
        block = Block(
            i=jnp.where(live, i, size + lane),  # distinct, so that indices stay unique
            j=jnp.where(live, j, size + width + lane),
            theta=theta,
            position=jnp.where(live, position, length + lane),
        )
        return start + live.sum(dtype=jnp.int32), step(carry, block)

    state = varying_as((jnp.zeros((), jnp.int32), carry), ordered, count, carry)
    return jax.lax.while_loop(lambda s: s[0] < count, body, state)[1]
