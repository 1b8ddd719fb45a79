"""The density of a product of random Givens rotations: density ↔ number of rotations.

Use it to find the density before drawing, or the number of rotations that a density takes.

Each rotation mixes two coordinates drawn uniformly among ``N``, the larger side of the matrix. A
vector of the smaller side starts with one non-zero. A vector with ``k`` non-zeros gains another
exactly when the plane joins a zero and a non-zero coordinate:

    P(k → k + 1) = 2 k (N − k) / (N (N − 1)),    k₀ = 1.

So the expected density ``E[k_t] / N`` after ``t`` rotations depends only on ``N``; it is the
same for square, wide and tall matrices, and for every continuous law of the angles.

This holds for independent planes, the paper's. Matchings have a chain by rounds: if m of the
N // 2 disjoint planes of a round mix a zero and a non-zero coordinate, the vector gains m
non-zeros. If the planes cover all N coordinates (N even), then for m of the same parity as k

    P(k → k + m) = 2^m (N/2)! / (m! ((k − m)/2)! ((N − k − m)/2)!) / C(N, k),

which counts the sets of k coordinates with m mixed, (k − m)/2 full and otherwise empty pairs.
If N is odd, the coordinate that is left out is a non-zero with probability k / N, and the others
follow the same law for N − 1. Within a round the pairs are exchangeable, so the expected density
grows linearly.

Nothing here is traced: sizes and densities are Python numbers, and results are NumPy or Python
numbers, so that they can be shapes of a compiled program.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from eoi_jax._internal import checks
from eoi_jax.planes import PlaneLaw, check, independent, matching
from eoi_jax.typing import Shape

__all__ = ["expected_density", "min_density", "nonzeros_distribution", "num_rotations"]

# The largest size for which "auto" iterates the chain: its whole curve costs 0.15 s, once.
_EXACT_SIZE = 1024
# The largest number of updated probabilities that one call of the exact chain may cost: seconds.
_MAX_UPDATES = 2e9
# The largest size whose distribution is returned: 256 MiB of probabilities.
_MAX_SIZE = 2**25
# The largest size of all, below which float64 tells it from its neighbors.
_MAX_ANY_SIZE = 2**53


def nonzeros_distribution(
    size: int, num_rotations: int, *, planes: PlaneLaw = independent
) -> NDArray[np.float64]:
    r"""Distribution of the number of non-zeros of one vector after a number of rotations.

    With :math:`b_k = 2k(N-k) / (N(N-1))` and :math:`p_0(k) = [k = 1]`,

    .. math:: p_{t+1}(k) = (1 - b_k)\, p_t(k) + b_{k-1}\, p_t(k-1).

    The cost is O(size · num_rotations): 10 ms for 784 and 1800, 0.2 s for 4096 and 12 700. The
    chain stops when it is absorbed, with a probability of less than 1e-17 outside of ``k = size``.
    This is after about ``30 * size`` rotations.

    For :data:`eoi_jax.planes.matching` it is the chain by rounds (see the module), with a part of
    a round at the end. The planes of this part cover uniformly drawn coordinates. The number of
    non-zeros among these is hypergeometric, and then follows the law of a whole round of as many
    coordinates.

    Args:
        size: ``N``, the larger side of the matrix, in [1, 2**25].
        num_rotations: ``t``, the number of rotations applied, at least 0.
        planes: The law of the planes.

    Returns:
        A float64 array of ``size + 1`` probabilities: entry ``k`` is the probability of exactly
        ``k`` non-zeros among ``size`` coordinates.

    Raises:
        ValueError: For a size or a number outside its range, for planes without a theory, or if the
            chain would take more than 2e9 updates.

    Example:
        >>> from eoi_jax import theory
        >>> theory.nonzeros_distribution(3, 1).round(3)
        array([0.   , 0.333, 0.667, 0.   ])
        >>> from eoi_jax.planes import matching
        >>> theory.nonzeros_distribution(8, 8, planes=matching).round(3)[:5]
        array([0.   , 0.   , 0.143, 0.   , 0.857])

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, whose algorithm draws these
        planes.
    """
    remedy = "Use expected_density(size, num_rotations, method='closed_form')."
    size = checks.integer(size, low=1, high=_MAX_SIZE, name="size", remedy=remedy)
    num_rotations = checks.integer(num_rotations, low=0, name="num_rotations")
    if _check_planes(planes) is matching:
        _check_round_cost(size, remedy[:-2] + ", planes=matching).")
        return _matching_distribution(size, num_rotations)
    updates = size * min(num_rotations, 30 * size)
    if updates > _MAX_UPDATES:
        raise checks.value_error(
            "num_rotations",
            num_rotations,
            f"costs {updates:.1e} updates with size={size}, outside [0, {_MAX_UPDATES:.0e}]",
            remedy,
        )
    # The chain yields one array again and again, so only its last state can be kept.
    return deque(islice(_birth_chain(size), num_rotations + 1), maxlen=1).pop().copy()


def expected_density(
    size: int,
    num_rotations: int,
    *,
    method: Literal["auto", "exact", "closed_form"] = "auto",
    planes: PlaneLaw = independent,
) -> float:
    r"""Expected fraction of non-zeros after a number of rotations.

    The exact value is the mean of :func:`nonzeros_distribution`, divided by ``size``. The closed
    form treats the early growth as a Yule process, whose size is exponential, and the later growth
    as logistic:

    .. math::

        d_t \approx 1 - z e^z E_1(z), \qquad z = N e^{-2 (t + 1 + d_t / 2) / (N - 1)},

    where :math:`E_1` is the exponential integral. The shift ``1 + d / 2`` accounts for the
    discrete steps. The error of the closed form over all ``t`` is at most ``0.0125 / size`` for
    ``size >= 64`` (at most 0.06 of a rotation below density 0.99). For smaller sizes it grows:
    2.6e-4 at 32, 1.6e-3 at 16, 8e-3 at 8.

    This is the mean over matrices. The density of one matrix differs from it, with a standard
    deviation of up to 0.02 at 100 by 100, because the rows of a matrix share the rotations.

    For :data:`eoi_jax.planes.matching` the exact value is that of the chain by rounds (see the
    module), and the closed form updates mean and variance in each round,

    .. math::

        \mu \leftarrow \mu + \frac{\mu (N - \mu) - \sigma^2}{N - 1}, \qquad
        \sigma^2 \leftarrow \sigma^2 \Bigl(1 + \frac{N - 2\mu}{N - 1}\Bigr)^2
        + \frac{2 \mu (\mu - 1) (N - \mu) (N - \mu - 1)}{(N - 1)^2 (N - 3)},

    for even :math:`N`, with the mean in place of the count in the variance. The error is at most
    ``0.15 / size`` for ``size >= 64``, and for density 1 the number of rotations is within 5 %.

    Args:
        size: ``N``, the larger side of the matrix, at least 1.
        num_rotations: ``t``, the number of rotations applied, at least 0.
        method: ``"exact"``, ``"closed_form"``, or ``"auto"``: exact up to size 1024 (the curve of
            a size is computed once and kept), the closed form above.
        planes: The law of the planes.

    Returns:
        The expected density, in [1 / size, 1].

    Raises:
        ValueError: For an argument outside its range, or if the exact chain would take more than
            2e9 updates.

    Example:
        >>> from eoi_jax import theory
        >>> round(theory.expected_density(784, 1786), 4)
        0.1001
        >>> round(theory.expected_density(65_536, 294_573), 4)
        0.1
        >>> from eoi_jax.planes import matching
        >>> round(784 * theory.expected_density(784, 392, planes=matching), 6)
        2.0

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, from whose algorithm the chain
        follows; the closed form is derived in this library.
    """
    size = checks.integer(size, low=1, high=_MAX_ANY_SIZE, name="size")
    num_rotations = checks.integer(num_rotations, low=0, name="num_rotations")
    _check_method(method)
    _check_planes(planes)
    if size == 1:
        return 1.0
    if planes is matching:
        return _within_round(_round_curve(size, _is_exact(method, size))[0], size, num_rotations)
    if method == "closed_form" or (method == "auto" and size > _EXACT_SIZE):
        return _closed_form(size, num_rotations)
    if size > _EXACT_SIZE:
        distribution = nonzeros_distribution(size, num_rotations)
        return float(1.0 - distribution @ (np.arange(size, -1, -1) / size))
    curve = _exact_curve(size)
    return float(curve[min(num_rotations, len(curve) - 1)])


def num_rotations(
    size: int,
    density: float,
    *,
    method: Literal["auto", "exact", "closed_form"] = "auto",
    planes: PlaneLaw = independent,
) -> int:
    r"""Number of rotations whose expected density is closest to ``density``.

    The inverse of :func:`expected_density`. Up to size 1024 the exact curve is searched. Above, the
    closed form is solved for ``z``, with one scalar root:

    .. math:: t = \frac{N - 1}{2} \ln \frac{N}{z} - 1 - \frac{d}{2}, \qquad d = 1 - z e^z E_1(z).

    Density 1 has no finite inverse, since after any number of rotations a row is full only with
    some probability. For density 1 the function returns the mean time until a given row is full,
    :math:`(N-1) H_{N-1}` with the harmonic number :math:`H`. The expected density at this time is
    about 0.985 for ``N = 100``, and tends to 1 as ``N`` grows. So densities between this value and
    1 need more rotations than the value returned for density 1. For
    :data:`eoi_jax.planes.matching` the value for density 1 is the mean number of rotations in the
    rounds until a given row is full.

    Args:
        size: ``N``, the larger side of the matrix, at least 1.
        density: The wanted fraction of non-zeros, in [1 / size, 1].
        method: ``"exact"``, ``"closed_form"``, or ``"auto"``: exact up to size 1024 (the curve of
            a size is computed once and kept), the closed form above.
        planes: The law of the planes.

    Returns:
        The number of rotations; of two that are equally close, the smaller.

    Raises:
        ValueError: For a size, a density or a method outside its range, for a traced density, or
            if the exact chain would take more than 2e9 updates.

    Example:
        >>> from eoi_jax import theory
        >>> theory.num_rotations(784, 0.1)
        1786
        >>> theory.num_rotations(65_536, 0.1)
        294573
        >>> from eoi_jax.planes import matching
        >>> theory.num_rotations(784, 4 / 784, planes=matching) <= 2 * 392 + 1
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024, whose algorithm stops at the
        density closest to the target.
    """
    size = checks.integer(size, low=1, high=_MAX_ANY_SIZE, name="size")
    _check_method(method)
    _check_planes(planes)
    if checks.is_traced(density):
        raise checks.value_error(
            "density",
            density,
            "is traced, outside the static numbers in (0, 1]",
            "The number of rotations is a shape: make density a static argument.",
        )
    target = checks.density(
        density,
        minimum=1.0 / size,
        why=f"An orthogonal matrix of larger side {size} has at least one non-zero of {size}.",
    )
    if size == 1:
        return 0
    if planes is matching:
        curve, until_full = _round_curve(size, _is_exact(method, size))
        return until_full if target == 1.0 else _invert_rounds(curve, size, target)
    if target == 1.0:
        return round((size - 1) * float(special.digamma(size) + np.euler_gamma))
    if method == "closed_form" or (method == "auto" and size > _EXACT_SIZE):
        return _closed_form_inverse(size, target)
    curve = _exact_curve(size)
    above = int(np.searchsorted(curve, target))
    if above > 0 and target - curve[above - 1] <= curve[above] - target:
        return above - 1
    return above


def min_density(shape: Shape, *, column_axis: int = -1) -> float:
    r"""Smallest density that an orthogonal matrix of this shape can have.

    An ``n × m`` matrix with orthonormal rows or columns has at least one non-zero in each vector
    of its smaller side, so its density is at least :math:`\min(n, m) / (nm) = 1 / \max(n, m)`.
    A shape of more axes is flattened to a matrix as :func:`jax.nn.initializers.orthogonal` does:
    all axes but one are merged.

    Args:
        shape: At least two non-negative ints.
        column_axis: The axis that is not merged.

    Returns:
        The smallest density, in (0, 1]; 1 if the flattened matrix is empty.

    Raises:
        ValueError: For a shape of fewer than two axes, or an axis that the shape does not have.

    Example:
        >>> from eoi_jax import theory
        >>> theory.min_density((100, 784)) == 1 / 784
        True
        >>> theory.min_density((3, 3, 16, 64)) == 1 / 144
        True

    Reference:
        Nowak et al., "Sparser, Better, Deeper, Stronger", ICML 2024.
    """
    dims = checks.shape(shape)
    columns = dims[checks.axis(column_axis, len(dims), name="column_axis")]
    total = math.prod(dims)
    return 1.0 / max(columns, total // columns) if total else 1.0


def _check_method(method: str) -> None:
    remedy = "Leave the default 'auto': exact where that is cheap."
    checks.one_of(method, ("auto", "exact", "closed_form"), name="method", remedy=remedy)


def _check_planes(planes: PlaneLaw) -> PlaneLaw:
    if check(planes) is not independent and planes is not matching:
        remedy = "Count those of a simulation, by eoi_jax.givens.num_nonzeros."
        raise checks.value_error("planes", planes, "has no theory of its density", remedy)
    return planes


def _check_round_cost(size: int, remedy: str) -> None:
    if size**2 * 10 > _MAX_UPDATES:
        raise checks.value_error(
            "size",
            size,
            f"costs {10 * size**2:.1e} updates of the exact chain, outside [0, {_MAX_UPDATES:.0e}]",
            remedy,
        )


def _is_exact(method: str, size: int) -> bool:
    return method == "exact" or (method == "auto" and size <= _EXACT_SIZE)


@lru_cache(maxsize=64)
def _round_curve(size: int, exact: bool) -> tuple[NDArray[np.float64], int]:
    """Expected density after 0, 1, 2, … rounds of matchings; and rotations until a row is full."""
    densities, until_full = [1.0 / size], 0.0
    for density, full in _round_law(size) if exact else _round_moments(size):
        until_full += 1.0 - full
        if densities[-1] >= 1.0 - 1e-15 or len(densities) > 200:
            break
        densities.append(min(max(density, densities[-1]), 1.0))
    # The state before the first round is not full either, and a size of two is full after it.
    curve = np.array(densities)
    curve.flags.writeable = False
    return curve, round((1.0 + until_full) * (size // 2))


def _matching_distribution(size: int, num_rotations: int) -> NDArray[np.float64]:
    if size == 1:
        return np.array([0.0, 1.0])
    whole, part = divmod(num_rotations, size // 2)
    probability = np.zeros(size + 1)
    probability[1] = 1.0
    for after in islice(_round_chain(size), whole):
        probability = after
        if probability[:-1].sum() < 1e-17:
            return probability
    return _after_pairs(probability, part) if part else probability


def _within_round(curve: NDArray[np.float64], size: int, num_rotations: int) -> float:
    whole, part = divmod(num_rotations, size // 2)
    if whole >= len(curve) - 1:
        return float(curve[-1])
    return float(curve[whole] + (curve[whole + 1] - curve[whole]) * part / (size // 2))


def _invert_rounds(curve: NDArray[np.float64], size: int, target: float) -> int:
    pairs = size // 2
    whole = min(int(np.searchsorted(curve, target, side="right")) - 1, len(curve) - 2)
    whole = max(whole, 0)
    gain = (curve[whole + 1] - curve[whole]) / pairs
    # Of two numbers that are equally close, the smaller.
    part = math.ceil((target - curve[whole]) / gain - 0.5 - 1e-9)
    return whole * pairs + min(max(part, 0), pairs)


def _round_law(size: int) -> Iterator[tuple[float, float]]:
    """Yield the expected density, and the probability to be full, after 1, 2, … rounds."""
    zeros = np.arange(size, -1, -1) / size
    for probability in _round_chain(size):
        yield 1.0 - float(probability @ zeros), float(probability[-1])


def _round_chain(size: int) -> Iterator[NDArray[np.float64]]:
    """Yield the distribution after 1, 2, … rounds of matchings."""
    _check_round_cost(size, "Use method='closed_form'.")
    probability = np.zeros(size + 1)
    probability[1] = 1.0
    while True:
        probability = _after_pairs(probability, size // 2)
        yield probability


def _after_pairs(probability: NDArray[np.float64], pairs: int) -> NDArray[np.float64]:
    """Distribution after so many uniform disjoint planes, from that before them."""
    size, covered = len(probability) - 1, 2 * pairs
    nonzeros = np.arange(size + 1)
    log_factorial = special.gammaln(nonzeros + 1.0)

    def log_binomial(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    after = np.zeros(size + 1)
    likely = np.flatnonzero(probability > 1e-30)
    # Of the coordinates that no plane covers, so many are non-zeros.
    for outside in range(min(size - covered, likely[-1]) + 1):
        inside = likely - outside
        possible = (inside >= 0) & (inside <= covered)
        log_share = log_binomial(covered, np.clip(inside, 0, covered)) - log_binomial(size, likely)
        log_share += log_binomial(size - covered, np.array(outside))
        weights = np.zeros(size + 1)
        weights[likely] = probability[likely] * np.exp(np.where(possible, log_share, -np.inf))
        live = np.flatnonzero(weights > 1e-30)
        for chunk in np.array_split(live, -(-len(live) * covered // 2**21) or 1):
            k = chunk[:, None] - outside
            full = np.arange(pairs + 1)[None, :]
            mixed = k - 2 * full
            empty = pairs - full - mixed
            possible = (mixed >= 0) & (empty >= 0)
            mixed, empty = np.where(possible, mixed, 0), np.where(possible, empty, 0)
            log_p = (
                mixed * math.log(2.0)
                + log_factorial[pairs]
                - log_factorial[mixed]
                - log_factorial[full]
                - log_factorial[empty]
                - log_binomial(covered, k)
            )
            flow = np.exp(np.where(possible, log_p, -np.inf)) * weights[chunk][:, None]
            after += np.bincount((chunk[:, None] + mixed).ravel(), flow.ravel(), size + 1)
    normalized: NDArray[np.float64] = after / after.sum()
    return normalized


def _round_moments(size: int) -> Iterator[tuple[float, float]]:
    """Yield what :func:`_round_law` does, from the mean and the variance alone."""
    if size <= 3:
        yield from _round_law(size)
    odd = size % 2
    covered = size - odd

    def noise(k: float) -> float:
        product = k * max(k - 1.0, 0.0) * max(covered - k, 0.0) * max(covered - k - 1.0, 0.0)
        return 2.0 * product / ((covered - 1.0) ** 2 * (covered - 3.0))

    mean, variance = 1.0, 0.0
    while True:
        others = size - 1 + odd
        gain = (mean * (size - mean) - variance) / others
        slope = 1.0 + (size - 2.0 * mean) / others
        share = mean / size if odd else 0.0  # the probability that a non-zero sits out
        added = share * noise(mean - 1.0) + (1.0 - share) * noise(mean)
        added += share * (1.0 - share) * ((size - 2.0 * mean) / (covered - 1)) ** 2
        variance = variance * slope**2 + added
        mean = min(mean + max(gain, 0.0), float(size))
        # The number of zeros is nearly that of a Poisson law where full rows are likely.
        yield mean / size, math.exp(mean - size)


def _birth_chain(size: int) -> Iterator[NDArray[np.float64]]:
    """Yield the distribution after 0, 1, 2, … rotations, one array that is updated in place."""
    nonzeros = np.arange(size + 1.0)
    birth = 2.0 * nonzeros * (size - nonzeros) / max(size * (size - 1), 1)
    probability, scratch = np.zeros(size + 1), np.empty(size)
    probability[1] = 1.0
    top, step = min(2, size), 0
    while True:
        yield probability
        if step % size == 0 and probability[:-1].sum() < 1e-17:
            return
        flow = np.multiply(probability[:top], birth[:top], out=scratch[:top])
        probability[:top] -= flow
        probability[1 : top + 1] += flow
        # The front waits until it weighs something: subnormal numbers are slow.
        if top < size and probability[top] > 1e-250:
            top += 1
        step += 1


@lru_cache(maxsize=64)
def _exact_curve(size: int) -> NDArray[np.float64]:
    """Expected density after 0, 1, 2, … rotations, until it is 1 in float64."""
    if 30 * size**2 > _MAX_UPDATES:
        raise checks.value_error(
            "size",
            size,
            f"costs {30 * size**2:.1e} updates of the exact chain, outside [0, {_MAX_UPDATES:.0e}]",
            "Use method='closed_form'.",
        )
    zeros = np.arange(size, -1, -1) / size
    # One minus the zeros, rather than the non-zeros: the last densities differ from 1 by little.
    curve = 1.0 - np.fromiter((p @ zeros for p in _birth_chain(size)), np.float64)
    curve = np.maximum.accumulate(curve)
    curve.flags.writeable = False
    return curve


def _saturation(z: float) -> float:
    """Return ``1 − z e^z E₁(z) = e^z E₂(z)``, to 1e-15 relative for every ``z >= 0``."""
    if z <= 500.0:
        return math.exp(z) * float(special.expn(2, z))
    series = 1.0
    for j in range(10, 1, -1):
        series = 1.0 - j / z * series
    return series / z


def _closed_form(size: int, num_rotations: int) -> float:
    """Expected density by the closed form, in [1 / size, 1]."""
    density = 1.0 / size
    # The map contracts by less than 1 / size, so ten rounds reach float64 from size 64 on.
    for _ in range(10):
        shifted = num_rotations + 1.0 + density / 2.0
        density = _saturation(size * math.exp(-2.0 * shifted / (size - 1)))
    return min(max(density, 1.0 / size), 1.0)


def _closed_form_inverse(size: int, density: float) -> int:
    """Solve the closed form for the number of rotations."""
    density = max(density, 1.0 / size)
    low, high = -60.0, math.log(2.0 * size)

    def excess(log_z: float) -> float:
        return _saturation(math.exp(log_z)) - density

    log_z = float(optimize.brentq(excess, low, high, xtol=1e-13))
    return max(round((size - 1) / 2.0 * (math.log(size) - log_z) - 1.0 - density / 2.0), 0)
