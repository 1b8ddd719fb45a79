r"""The law of the planes that rotations mix: independent pairs, or perfect matchings in rounds.

What an orthogonal matrix looks like at a density is a matter of its planes. With
:data:`independent` planes, the paper's, the :math:`N` coordinates are mixed unevenly: at low
density some rows keep one non-zero while others have many. With :data:`matching`, every round of
:math:`\lfloor N/2 \rfloor` rotations mixes every coordinate exactly once (all but one if :math:`N`
is odd), so after :math:`r` rounds every row and column of a square matrix has up to :math:`2^r`
non-zeros, fewer only where supports meet.

=================== ==============================================================================
:data:`independent` uniform over the pairs of coordinates, each rotation on its own
:data:`matching`    rounds of independent uniform perfect matchings
=================== ==============================================================================

>>> import jax
>>> import eoi_jax as eoi
>>> w = eoi.orthogonal(jax.random.key(0), (256, 256), 1 / 32, planes=eoi.planes.matching)
>>> rows = (w != 0).sum(axis=1)
>>> int(rows.min()) > 1, int(rows.max()) <= 16
(True, True)
>>> int((eoi.orthogonal(jax.random.key(0), (256, 256), 1 / 32) != 0).sum(axis=1).min())
1
"""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eoi_jax._internal import checks
from eoi_jax._internal.vmap import varying_as
from eoi_jax.typing import Array

__all__ = ["PlaneLaw", "check", "independent", "matching"]

_ROUNDS = 0x4D415443  # sets the stream of the matchings apart from other uses of the key


class PlaneLaw(abc.ABC):
    """A law of planes: what plane each rotation of a sequence has, by the key and its index.

    A law is static: it is compiled into the programs that draw.
    """

    @abc.abstractmethod
    def sample(
        self, key: Array, first: Array, words: Array, size: Array, capacity: int | None
    ) -> tuple[Array, Array]:
        """Draw the planes of the rotations ``first, first + 1, …``.

        Args:
            key: A key of Threefry.
            first: Index of the first rotation, uint32; may be traced.
            words: ``(num_rotations, 2)`` uint32, random and of the key and each index alone.
            size: Number of coordinates, at least 2, uint32; may be traced.
            capacity: A static number that ``size`` does not exceed, or None if there is none.

        Returns:
            ``i`` and ``j``, each ``(num_rotations,)`` int32, different from each other.
        """


class _Independent(PlaneLaw):
    def sample(
        self, key: Array, first: Array, words: Array, size: Array, capacity: int | None
    ) -> tuple[Array, Array]:
        i, j = _below(words[:, 0], size), _below(words[:, 1], size - 1)
        return i, jnp.where(j >= i, j + 1, j)

    def __repr__(self) -> str:
        return "eoi_jax.planes.independent"


class _Matching(PlaneLaw):
    def sample(
        self, key: Array, first: Array, words: Array, size: Array, capacity: int | None
    ) -> tuple[Array, Array]:
        if capacity is None:
            raise checks.value_error(
                "capacity",
                capacity,
                "is no bound of a traced size",
                "A matching is sorted in an array of static length: give a size that is never "
                "exceeded.",
            )
        number, pairs = len(words), capacity // 2
        zeros = jnp.zeros((number,), jnp.int32)
        if number == 0:
            return zeros, zeros
        stream = jax.random.wrap_key_data(
            jax.random.key_data(key) ^ np.uint32(_ROUNDS), impl="threefry2x32"
        )
        coordinate = jnp.arange(capacity, dtype=jnp.uint32)
        pair = jnp.arange(pairs, dtype=jnp.int32)
        per_round = size // 2
        last = (first + jnp.uint32(number - 1)) // per_round

        def add(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            index, i, j = state
            of_round = jax.random.fold_in(stream, index)
            # Words of each coordinate alone, so that the capacity changes nothing.
            hashed = jax.vmap(lambda c: jax.random.key_data(jax.random.fold_in(of_round, c)))
            word = jnp.where(coordinate < size, hashed(coordinate)[:, 0], jnp.uint32(2**32 - 1))
            # Stable: what is at or beyond the size stays behind the coordinates, ties or not.
            mixed = jnp.argsort(word, stable=True).astype(jnp.int32)[: 2 * pairs].reshape(-1, 2)
            # The difference of two unsigned numbers wraps, and the cast unwraps it.
            at = (index * per_round - first).astype(jnp.int32) + pair
            inside = (at >= 0) & (at < number) & (pair < per_round.astype(jnp.int32))
            at = jnp.where(inside, at, number + pair)
            i = i.at[at].set(mixed[:, 0], mode="drop", unique_indices=True)
            j = j.at[at].set(mixed[:, 1], mode="drop", unique_indices=True)
            return index + 1, i, j

        start = varying_as((first // per_round, zeros, zeros), key, first, size, words)

        # Counted from the first round: the number of the last one may be the largest of all.
        def unfinished(state: tuple[Array, Array, Array]) -> Array:
            return state[0] - first // per_round <= last - first // per_round

        _, i, j = jax.lax.while_loop(unfinished, add, start)
        return i, j

    def __repr__(self) -> str:
        return "eoi_jax.planes.matching"


independent: PlaneLaw = _Independent()
"""Planes uniform over the pairs of coordinates, independent of each other: the paper's law."""

matching: PlaneLaw = _Matching()
r"""Rounds of independent, uniform perfect matchings of the coordinates.

Rotation :math:`t` is pair :math:`t \bmod \lfloor N/2 \rfloor` of round
:math:`\lfloor t / \lfloor N/2 \rfloor \rfloor`. A round mixes each coordinate with one other; if
:math:`N` is odd, one coordinate, uniform in each round, sits out. The rotations of a round commute,
so a round is one wave, and every row and column of a square matrix has at most :math:`2^r`
non-zeros after :math:`r` rounds and, for even :math:`N`, at least two after one. A density between
those of two rounds takes a part of the next round. Matchings are uniform up to ties among
:math:`N` words of 32 bits.
"""


def check(planes: Any) -> PlaneLaw:
    """Accept a law of planes.

    Args:
        planes: What was given as ``planes=``.

    Returns:
        The same law.

    Raises:
        ValueError: If it is no :class:`PlaneLaw`.

    Example:
        >>> import eoi_jax as eoi
        >>> eoi.planes.check(eoi.planes.matching)
        eoi_jax.planes.matching
    """
    if isinstance(planes, PlaneLaw):
        return planes
    raise checks.value_error(
        "planes",
        planes,
        "is no law of planes",
        "Use eoi_jax.planes.independent, the default, or eoi_jax.planes.matching.",
    )


def _below(bits: Array, bound: int | Array) -> Array:
    """Map 32 random bits to an integer below ``bound``: the high word of their product."""
    low, high = bits & 0xFFFF, bits >> 16
    bound_low, bound_high = jnp.uint32(bound & 0xFFFF), jnp.uint32(bound >> 16)
    middle = high * bound_low + ((low * bound_low) >> 16)
    carry = (low * bound_high + (middle & 0xFFFF)) >> 16
    return (high * bound_high + (middle >> 16) + carry).astype(jnp.int32)
