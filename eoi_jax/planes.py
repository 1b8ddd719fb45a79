r"""The law of the planes that rotations mix: independent pairs, matchings in rounds, or a pattern.

At a given density, the planes decide where an orthogonal matrix has its non-zeros. With
:data:`independent` planes, the paper's, the :math:`N` coordinates are mixed unevenly: at low
density some rows keep one non-zero while others have many. With :data:`matching`, every round of
:math:`\lfloor N/2 \rfloor` rotations mixes every coordinate exactly once (all but one if :math:`N`
is odd). So after :math:`r` rounds every row and column of a square matrix has up to :math:`2^r`
non-zeros, and fewer only where supports meet. :func:`within` keeps the planes inside a pattern of
your choice, such as a band, a butterfly or blocks.

=================== ==============================================================================
:data:`independent` uniform over the pairs of coordinates, independent for each rotation
:data:`matching`    rounds of independent uniform perfect matchings
:func:`within`      uniform over the pairs of coordinates that a pattern allows
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
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from eoi_jax._internal import checks
from eoi_jax._internal.vmap import varying_as
from eoi_jax._internal.waves import assign_waves
from eoi_jax.typing import Array

__all__ = ["PlaneLaw", "check", "independent", "matching", "within"]

# Every row of a 4096 x 4096 matrix is full after about 9 rotations per coordinate, and the chance
# that one is not after this many is below 1e-45.
_UNTIL_FULL = 64
# Up to this size a word of 32 bits holds an index and enough random bits.
_MAX_PACKED = 4096
_ROUNDS = 0x4D415443  # sets the stream of the matchings apart from other uses of the key
_REMEDY = "Give (N, N) booleans: True where coordinates i and j may be rotated into each other."


class PlaneLaw(abc.ABC):
    """A law of planes: it gives the plane of each rotation of a sequence, from the key and index.

    A law is static: it is compiled into the programs that draw. Equal laws share programs.

    Attributes:
        size: The number of coordinates that the law is for; None for any number.
        may_underflow: Whether paths between coordinates are so long that products of sines along
            them may underflow to zero. Then non-zeros are counted on the floats.
        in_rounds: Whether each ``size // 2`` rotations, from the first on, are disjoint.
        is_pattern: Whether the planes are limited to a pattern.
    """

    size: int | None = None
    may_underflow: bool = False
    in_rounds: bool = False
    is_pattern: bool = False

    def of_size(self, size: int | Array) -> PlaneLaw:
        """Return the law for ``size`` coordinates. Only patterns return another law."""
        del size
        return self

    def max_nonzeros(self, rows: Any, columns: Any) -> Any:
        """Count the non-zeros of a tall or square matrix to which no rotation adds another."""
        return rows * columns

    def rotations_until_full(self, size: int) -> int:
        """Bound the rotations until nothing is left to mix, up to a probability below 1e-45."""
        return _UNTIL_FULL * size

    def waves(self, i: Array, j: Array, first: Array, size: int | Array, capacity: int) -> Array:
        """Order rotations ``first, first + 1, …`` into waves of disjoint ones."""
        del first, size
        return assign_waves(i, j, capacity)

    @abc.abstractmethod
    def sample(
        self, key: Array, first: Array, words: Array, size: Array, capacity: int | None
    ) -> tuple[Array, Array]:
        """Draw the planes of the rotations ``first, first + 1, …``.

        Args:
            key: A key of Threefry.
            first: Index of the first rotation, uint32; may be traced.
            words: ``(num_rotations, 2)`` random uint32, which depend only on the key and the index.
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
    in_rounds = True

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
        pair = jnp.arange(pairs, dtype=jnp.int32)
        per_round = size // 2
        last = (first + jnp.uint32(number - 1)) // per_round

        def add(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            index, i, j = state
            shuffled = _shuffled(jax.random.fold_in(stream, index), size, capacity)
            mixed = shuffled[: 2 * pairs].reshape(-1, 2)
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

    def waves(self, i: Array, j: Array, first: Array, size: int | Array, capacity: int) -> Array:
        per_round = jnp.asarray(size, jnp.uint32) // 2
        first = first.astype(jnp.uint32)
        index = first + jnp.arange(len(i), dtype=jnp.uint32)
        return (index // per_round - first // per_round).astype(jnp.int32)

    def __repr__(self) -> str:
        return "eoi_jax.planes.matching"


independent: PlaneLaw = _Independent()
"""Independent planes, uniform over the pairs of coordinates, which is the law of the paper."""

matching: PlaneLaw = _Matching()
r"""Rounds of independent, uniform perfect matchings of the coordinates.

Rotation :math:`t` is pair :math:`t \bmod \lfloor N/2 \rfloor` of round
:math:`\lfloor t / \lfloor N/2 \rfloor \rfloor`. A round mixes each coordinate with one other. If
:math:`N` is odd, each round leaves out one coordinate, drawn uniformly. The rotations of a round
commute, so a round is one wave. Every row and column of a square matrix has at most :math:`2^r`
non-zeros after :math:`r` rounds and, for even :math:`N`, at least two after one round. A density
between those of two rounds takes a part of the next round. A matching sorts the coordinates by
random words, and is uniform up to ties among these :math:`N` words of 32 bits. Up to size 4096, a
word shares its 32 bits with the index and keeps 20 or more of them; then a fair coin decides ties,
one coin for all ties of a round between indices that first differ in the same bit.
"""


def within(pattern: Any) -> PlaneLaw:
    r"""Planes inside a pattern: uniform over the pairs of coordinates that the pattern allows.

    The pair :math:`\{i, j\}`, :math:`i \ne j`, is a plane if ``pattern[i, j]`` or
    ``pattern[j, i]``; each rotation draws one of the planes independently. Coordinates are those of
    the larger side, :math:`N = \max(n, m)`, and the vectors of the smaller side start at the first
    :math:`\min(n, m)` of them.

    The pattern limits the *planes*. The support of the matrix spreads along paths of planes, so it
    stays inside the pattern if the pattern is an equivalence relation (blocks), and leaves it
    otherwise (a band). Coordinates that no path connects never mix. With the connected components
    :math:`C`, the largest density of an :math:`n \times m` matrix, :math:`n \ge m`, is therefore

    .. math:: d_\max = \frac{1}{nm} \sum_C |C| \cdot |C \cap \{0, \dots, m - 1\}|.

    Every density from :math:`1/N` to :math:`d_\max` is reached with a continuous law of angles,
    such as the default, and a higher density is refused. Rotations by equal angles may undo one
    another inside a small component; a density that they do not reach is an error too.
    Along a path of more than 32 planes products of sines may underflow. For such patterns non-zeros
    are counted on the floats, which takes longer.

    Args:
        pattern: ``(N, N)`` booleans, or a function ``size -> (size, size) booleans`` for networks
            with layers of several sizes. The pattern is static: the planes are constants of the
            compiled programs (8 bytes each), and patterns of equal content share programs. The
            function is called once for each size.

    Returns:
        A law of planes, equal to that of any pattern of the same planes.

    Raises:
        ValueError: Here for a pattern that is traced, not boolean, not square, or without a pair.
            Where the law is used: for a size that is not the pattern's, for a density above
            :math:`d_\max` (NaN if the density is traced), and for a traced number of coordinates.
            A matrix may also become NaN if 2**31 rotations do not fill its pattern (a narrow band
            of many thousand coordinates, at a density near the largest).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import numpy as np
        >>> import eoi_jax as eoi
        >>> blocks = np.kron(np.eye(4), np.ones((16, 16))) > 0
        >>> law = eoi.planes.within(blocks)
        >>> w = eoi.orthogonal(jax.random.key(0), (64, 64), 0.1, planes=law)
        >>> bool((w[~blocks] == 0).all()), bool(jnp.allclose(w @ w.T, jnp.eye(64), atol=1e-5))
        (True, True)
        >>> def band(size):
        ...     i, j = np.indices((size, size))
        ...     return abs(i - j) <= 4
        >>> init = eoi.dense(0.2, planes=eoi.planes.within(band))  # for kernels of all shapes
        >>> init(jax.random.key(0), (64, 10)).shape
        (64, 10)
    """
    return _WithinFunction(pattern) if callable(pattern) else _Within(pattern)


class _Within(PlaneLaw):
    is_pattern = True

    def __init__(self, pattern: Any):
        allowed = _symmetric(pattern)
        self.size: int = len(allowed)
        i, j = np.nonzero(np.triu(allowed, 1))
        self._pairs = np.stack([i, j], axis=1).astype(np.int32)
        self._hash = hash((self.size, self._pairs.tobytes()))
        if self.size > 1 and not len(self._pairs):
            problem = "allows no pair of different coordinates"
            raise checks.value_error("pattern", f"{self.size} x {self.size}", problem, _REMEDY)
        graph = sparse.csr_array((np.ones(len(i), np.int8), (i, j)), (self.size, self.size))
        _, self._component = sparse.csgraph.connected_components(graph, directed=False)
        _, roots = np.unique(self._component, return_index=True)
        steps = sparse.csgraph.dijkstra(
            graph, directed=False, indices=roots, unweighted=True, min_only=True
        )
        self._diameter = 2 * int(steps.max())  # or less
        # The logarithm of a random |sine| is -0.7 +- 0.9: 32 of them are not below 1e-38.
        self.may_underflow = self._diameter > 32

    def of_size(self, size: int | Array) -> PlaneLaw:
        if _static(size) not in (0, 1, self.size):
            raise checks.value_error(
                "planes",
                self,
                f"is a pattern of {self.size} coordinates, outside the size={size} of this matrix",
                "Give within a function size -> pattern, or a pattern of the larger side.",
            )
        # A single coordinate has no planes.
        return self if size == self.size else independent

    def max_nonzeros(self, rows: Any, columns: Any) -> Any:
        del rows
        return int(
            np.bincount(self._component)
            @ np.bincount(self._component[:columns], minlength=self._component.max() + 1)
        )

    def rotations_until_full(self, size: int) -> int:
        # The time to walk a path of D planes, each drawn once in P rotations, is nearly a sum of D
        # exponential times of mean P. By Chernoff's bound it exceeds P (4 D + 2 L) with a
        # probability below exp(-L), for each of the size**2 entries. Floats are not zero once
        # diffusion, which takes D**2, is under way: exp(-D**2 / 2 t) > 1e-38 from t = D**2 / 170.
        chance = 2 * math.log(size) + 45 * math.log(10)
        steps = 4 * self._diameter + math.ceil(2 * chance) + self._diameter**2 // 32
        return len(self._pairs) * steps

    def sample(
        self, key: Array, first: Array, words: Array, size: Array, capacity: int | None
    ) -> tuple[Array, Array]:
        drawn = jnp.asarray(self._pairs)[_below(words[:, 0], len(self._pairs))]
        swap = words[:, 1:] >> 31 == 1
        i, j = jnp.where(swap, drawn[:, ::-1], drawn).T
        return i, j

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Within):
            return NotImplemented
        return self.size == other.size and np.array_equal(self._pairs, other._pairs)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"eoi_jax.planes.within({self.size} x {self.size}, {len(self._pairs)} planes)"


class _WithinFunction(PlaneLaw):
    is_pattern = True

    def __init__(self, pattern: Callable[[int], Any]):
        self._pattern = pattern
        self._laws: dict[int, PlaneLaw] = {}

    def of_size(self, size: int | Array) -> PlaneLaw:
        size = _static(size)
        if size < 2:
            return independent
        if size not in self._laws:
            self._laws[size] = _Within(self._pattern(size)).of_size(size)
        return self._laws[size]

    def sample(
        self, key: Array, first: Array, words: Array, size: Array, capacity: int | None
    ) -> tuple[Array, Array]:
        raise AssertionError("planes are drawn from the law of one size, of_size(size)")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _WithinFunction):
            return NotImplemented
        return bool(self._pattern == other._pattern)

    def __hash__(self) -> int:
        return hash(self._pattern)

    def __repr__(self) -> str:
        name = getattr(self._pattern, "__name__", type(self._pattern).__name__)
        return f"eoi_jax.planes.within({name})"


def check(planes: Any) -> PlaneLaw:
    """Check that an argument is a law of planes, and return it.

    Args:
        planes: The value of an argument ``planes=``.

    Returns:
        The same law.

    Raises:
        ValueError: If ``planes`` is no :class:`PlaneLaw`.

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
        "Use eoi_jax.planes.independent, the default, eoi_jax.planes.matching, or "
        "eoi_jax.planes.within(pattern).",
    )


def _static(size: int | Array) -> int:
    if checks.is_traced(size):
        remedy = "A pattern is of one size: make size a static argument."
        raise checks.value_error("size", size, "is traced", remedy)
    return int(size)


def _symmetric(pattern: Any) -> NDArray[np.bool_]:
    if checks.is_traced(pattern):
        raise checks.value_error("pattern", pattern, "is traced", "Close over a static array.")
    array = np.asarray(pattern)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise checks.value_error("pattern.shape", array.shape, "is outside (N, N)", _REMEDY)
    if array.dtype != np.bool_:
        raise checks.value_error("pattern.dtype", array.dtype.name, "is not bool", _REMEDY)
    allowed: NDArray[np.bool_] = array | array.T
    return allowed


def _shuffled(key: Array, size: Array, capacity: int) -> Array:
    """Shuffle the coordinates below ``size``; whatever follows them fills up to ``capacity``."""
    coordinate = jnp.arange(capacity, dtype=jnp.uint32)
    # Words of each two coordinates alone, so that the capacity changes nothing.
    word = jax.vmap(lambda c: jax.random.key_data(jax.random.fold_in(key, c)))(
        jnp.arange(-(-capacity // 2), dtype=jnp.uint32)
    ).reshape(-1)[:capacity]
    # A sort of one array of packed (word, index) is several times faster than one of pairs. The
    # mask decides ties: else the lower index would always come first.
    bits = 32 - jax.lax.clz(size - 1)
    low = (jnp.uint32(1) << bits) - 1
    mask = jax.random.key_data(jax.random.fold_in(key, 2**32 - 1))[0] & low
    packed = (word << bits) | (coordinate ^ mask)
    behind = jnp.uint32(2**32 - 1)
    if capacity <= _MAX_PACKED:
        # The last valid word may equal this one, and then they mean the same coordinate.
        return ((jnp.sort(jnp.where(coordinate < size, packed, behind)) & low) ^ mask).astype(
            jnp.int32
        )
    word = jnp.where(size <= _MAX_PACKED, packed, word)
    word = jnp.where(coordinate < size, word, behind)
    # Stable: what is at or beyond the size stays behind the coordinates, ties or not.
    return jnp.argsort(word, stable=True).astype(jnp.int32)


def _below(bits: Array, bound: int | Array) -> Array:
    """Map 32 random bits to an integer below ``bound``: the high word of their product."""
    low, high = bits & 0xFFFF, bits >> 16
    bound_low, bound_high = jnp.uint32(bound & 0xFFFF), jnp.uint32(bound >> 16)
    middle = high * bound_low + ((low * bound_low) >> 16)
    carry = (low * bound_high + (middle & 0xFFFF)) >> 16
    return (high * bound_high + (middle >> 16) + carry).astype(jnp.int32)
