"""Mean-field theory of deep random networks: critical gains and predicted spectra.

Use it to choose the gain of a deep network before training, and to compare measured singular values
with what theory predicts.

A wide layer ``h' = W φ(h) + b``, ``W`` of variance ``σ_w² / fan_in`` and ``b ~ N(0, σ_b²)``, has
Gaussian preactivations of variance ``q' = σ_w² E[φ(√q z)²] + σ_b²``, ``z ~ N(0, 1)``. Its Jacobian
has the mean squared singular value ``χ = σ_w² E[φ'(√q z)²]``: gradients vanish with depth if χ is
below 1, and explode if it is above. Nothing is traced: arguments and results are float64, and
expectations have an error of 1e-12.

References:
    Poole et al., "Exponential expressivity in deep neural networks through transient chaos",
    NeurIPS 2016; Schoenholz et al., "Deep Information Propagation", ICLR 2017; Pennington,
    Schoenholz and Ganguli, "Resurrecting the sigmoid in deep learning through dynamical isometry:
    theory and practice", NeurIPS 2017, and "The Emergence of Spectral Universality in Deep
    Networks", AISTATS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special
from scipy.optimize.elementwise import find_root

from eoi_jax._internal import checks

__all__ = [
    "Activation",
    "PredictedSpectrum",
    "chi",
    "critical_gain",
    "critical_line",
    "fixed_point",
    "predicted_moments",
    "predicted_singular_values",
]

_Floats: TypeAlias = NDArray[np.float64]
_Function: TypeAlias = Callable[[Any], Any]


class Activation(NamedTuple):
    """An activation function without a name in this module, with its derivative.

    Attributes:
        function: Maps a float64 array of NumPy to an array of the same shape, elementwise;
            functions of JAX compute in float64 here.
        derivative: The derivative of the function. With None it is found from polynomials that
            agree with the function up to rounding, and kinks are searched. The derivative then has
            an error of 1e-10 of the largest slope, or of 1e-3 for a function that computes in
            float32.
        kinks: Where the function or its derivative jumps. Without a derivative, kinks are found;
            jumps of the function are found too, and refused unless they are listed here.

    Example:
        >>> import numpy as np
        >>> from eoi_jax import mean_field
        >>> sine = mean_field.Activation(np.sin, np.cos)
        >>> round(mean_field.critical_gain(sine, q=0.0), 6)
        1.0
    """

    function: _Function
    derivative: _Function | None = None
    kinks: tuple[float, ...] = ()


class PredictedSpectrum(NamedTuple):
    """A distribution of singular values: a density on a grid, and atoms.

    :func:`predicted_singular_values` returns it. The density can be infinite at an end: integrate
    with ``mass_below``. The Wasserstein-1 distance of ``n`` sorted values from it is
    ``abs(values - quantile((arange(n) + 0.5) / n)).mean()``.

    Attributes:
        grid: Increasing singular values, ``(n,)``; a single 0 without mass if there are only atoms.
        density: Density at each grid point, ``(n,)``; its integral is one minus the mass of the
            atoms.
        mass_below: Mass of the density below each grid point, without atoms, ``(n,)``.
        atoms: Increasing singular values of positive mass, ``(k,)``.
        atom_masses: The masses of the atoms, ``(k,)``.

    Example:
        >>> from eoi_jax import mean_field
        >>> law = mean_field.predicted_singular_values("identity", 10, 1.0, 1.0)
        >>> law.atoms.round(9).tolist(), round(float(law.quantile(0.5)), 9)
        ([1.0], 1.0)
    """

    grid: _Floats
    density: _Floats
    mass_below: _Floats
    atoms: _Floats
    atom_masses: _Floats

    def cdf(self, values: float | _Floats) -> _Floats:
        """Fraction of singular values that are at most ``values``."""
        values = np.asarray(values, np.float64)
        atoms = (self.atom_masses * (self.atoms <= values[..., None])).sum(-1)
        return np.minimum(atoms + np.interp(values, self.grid, self.mass_below, left=0.0), 1.0)

    def quantile(self, fractions: float | _Floats) -> _Floats:
        """Smallest value such that this fraction of singular values, in [0, 1], is at most it."""
        return np.asarray(np.interp(fractions, *self._corners()))

    def moments(self, count: int = 2) -> _Floats:
        """Means of the squared singular values and of their powers up to ``count``."""
        mass, ends = self._corners()
        powers = 2 * np.arange(1, count + 1)[:, None]
        middles = (ends[1:] + ends[:-1]) / 2
        simpson = (ends[1:] ** powers + 4 * middles**powers + ends[:-1] ** powers) / 6
        return np.asarray(simpson @ np.diff(mass))

    def _corners(self) -> tuple[_Floats, _Floats]:
        """Masses and values at the corners of the distribution function, both in order."""
        below = (self.atom_masses * (self.atoms < self.grid[:, None])).sum(-1)
        after = self.cdf(self.atoms)
        mass = np.concatenate([self.mass_below + below, after - self.atom_masses, after])
        values = np.concatenate([self.grid, self.atoms, self.atoms])
        order = np.lexsort((mass, values))
        return np.maximum.accumulate(mass[order]), values[order]


_ActivationLike: TypeAlias = str | Activation | _Function


def fixed_point(activation: _ActivationLike, sigma_w: float, sigma_b: float) -> float:
    r"""Variance to which the preactivations of deep layers converge.

    The largest stable fixed point of :math:`q \mapsto \sigma_w^2 \mathbb{E}[\varphi(\sqrt{q}
    z)^2] + \sigma_b^2`; 0 where all signals vanish.

    Args:
        activation: ``"identity"``, ``"linear"``, ``"tanh"``, ``"hard_tanh"``, ``"relu"``,
            ``"leaky_relu"`` (slope 0.01), ``"selu"``, ``"gelu"`` (with erf), an
            :class:`Activation`, or a function of arrays.
        sigma_w: ``σ_w``, positive; the ``scale`` of the initializers.
        sigma_b: ``σ_b``, the standard deviation of the biases, at least 0.

    Returns:
        ``q*``: 0, or in [1e-14, 1e12]; to 1e-11 relative.

    Raises:
        ValueError: For an argument outside its range, where no finite fixed point is stable
            (ReLU above ``σ_w = √2``), or where every ``q`` is fixed (ReLU at ``√2``, no biases).

    Example:
        >>> from eoi_jax import mean_field
        >>> round(mean_field.fixed_point("relu", 1.0, 0.5), 6)
        0.5

    Reference:
        Poole et al., "Exponential expressivity in deep neural networks through transient chaos",
        NeurIPS 2016: the length map.
    """
    act = _activation(activation)
    sigma_w = _number(sigma_w, "sigma_w")
    sigma_b = _number(sigma_b, "sigma_b", zero=True)

    def growth(log_q: float) -> float:
        q = math.exp(log_q)
        return float(sigma_w**2 * _mean_square(act, q) + sigma_b**2) / q - 1.0

    scan = np.linspace(math.log(max(sigma_b**2, 1e-14)), math.log(1e12), 230)
    rates = np.array([growth(log_q) for log_q in scan])
    # Rounding gives a neutral map both signs.
    is_decided = np.abs(rates) > 1e-12
    scan, rates = scan[is_decided], rates[is_decided]
    stable = np.flatnonzero((rates[:-1] > 0) & (rates[1:] < 0))
    if stable.size:
        low, high = scan[stable[-1]], scan[stable[-1] + 1]
        act = _resolved(act, math.exp(high))
        if not growth(low) > 0 > growth(high):  # the crossing is nearer to a mark than kinks show
            low, high = scan[max(stable[-1] - 1, 0)], scan[min(stable[-1] + 2, scan.size - 1)]
        return math.exp(optimize.brentq(growth, low, high, xtol=1e-14, rtol=1e-14))
    if rates.size and rates[0] < 0:
        return sigma_b**2
    problem = "lets q grow beyond 1e12" if rates.size else "has every q as a fixed point"
    problem += f" with {activation!r}, outside the values with a finite stable fixed point"
    raise checks.value_error("sigma_w", sigma_w, problem, "Give a smaller value.")


def chi(activation: _ActivationLike, sigma_w: float, q: float) -> float:
    r"""Mean squared singular value of one layer's Jacobian.

    Args:
        activation: A name such as ``"tanh"`` (:func:`fixed_point` lists them), an
            :class:`Activation`, or a function of arrays.
        sigma_w: ``σ_w``, positive.
        q: Variance of the preactivations, at least 0; 0 is the limit from above.

    Returns:
        ``χ = σ_w² E[φ'(√q z)²]``; squared gradients grow by this factor in each layer.

    Raises:
        ValueError: For an argument outside its range, or an activation that has no slope there,
            or none that can be found.

    Example:
        >>> from eoi_jax import mean_field
        >>> round(mean_field.chi("relu", 1.0, 3.0), 6)
        0.5

    Reference:
        Schoenholz et al., "Deep Information Propagation", ICLR 2017: χ₁.
    """
    squares, weights = _squared_slopes(activation, q)
    return _number(sigma_w, "sigma_w") ** 2 * float((squares * weights).sum())


def critical_gain(activation: _ActivationLike, q: float = 0.0) -> float:
    r"""Gain at which gradients neither vanish nor explode: χ = 1.

    Args:
        activation: A name such as ``"tanh"`` (:func:`fixed_point` lists them), an
            :class:`Activation`, or a function of arrays.
        q: Variance of the preactivations, at least 0; 0 is the limit from above.

    Returns:
        ``σ_w = E[φ'(√q z)²]^(-1/2)``. :func:`critical_line` adds the biases that keep ``q`` fixed.

    Raises:
        ValueError: For an argument outside its range, or an activation that has no slope there,
            or none that can be found.

    Example:
        >>> from eoi_jax import mean_field
        >>> round(mean_field.critical_gain("relu"), 6)
        1.414214

    Reference:
        Schoenholz et al., "Deep Information Propagation", ICLR 2017: χ₁ = 1.
    """
    return 1.0 / math.sqrt(chi(activation, 1.0, q))


def critical_line(activation: _ActivationLike, q: float) -> tuple[float, float]:
    r"""Critical standard deviations of weights and biases that have ``q`` as their fixed point.

    .. math:: \sigma_w^2 = 1 / \mathbb{E}[\varphi'(\sqrt{q} z)^2], \qquad
        \sigma_b^2 = q - \sigma_w^2\, \mathbb{E}[\varphi(\sqrt{q} z)^2].

    Args:
        activation: A name such as ``"tanh"`` (:func:`fixed_point` lists them), an
            :class:`Activation`, or a function of arrays.
        q: Variance of the preactivations, positive.

    Returns:
        ``(σ_w, σ_b)``, standard deviations; ``(√2, 0)`` for ReLU at every ``q``.

    Raises:
        ValueError: For an argument outside its range, or where ``σ_b²`` would be negative.

    Example:
        >>> from eoi_jax import mean_field
        >>> "σ_w = {:.4f}, σ_b = {:.5f}".format(*mean_field.critical_line("tanh", 0.0259))
        'σ_w = 1.0247, σ_b = 0.00448'

    Reference:
        Pennington, Schoenholz and Ganguli, "Resurrecting the sigmoid in deep learning through
        dynamical isometry: theory and practice", NeurIPS 2017: the line (σ_w(q*), σ_b(q*)).
    """
    sigma_w = critical_gain(activation, q)
    q = _number(q, "q")
    act = _resolved(_activation(activation), q)
    rest = q - sigma_w**2 * float(_mean_square(act, q))
    if rest < -1e-12 * q:
        problem = f"is outside the variances at which {activation!r} can be critical"
        raise checks.value_error("q", q, problem, f"Biases of variance {rest:.3g} would be needed.")
    # What rounding leaves of a homogeneous activation's 0 is no bias.
    return sigma_w, math.sqrt(rest) if rest > 1e-12 * q else 0.0


def predicted_moments(
    activation: _ActivationLike, depth: int, sigma_w: float, q: float, count: int = 2
) -> _Floats:
    r"""Moments of the squared singular values of a deep Jacobian, by series of S-transforms.

    The first two, with :math:`\mu_k = \mathbb{E}[\varphi'(\sqrt{q} z)^{2k}]`, are :math:`m_1 =
    (\sigma_w^2 \mu_1)^L` and :math:`m_2 = m_1^2 (1 + L (\mu_2 / \mu_1^2 - 1))`.

    Args:
        activation: A name such as ``"tanh"`` (:func:`fixed_point` lists them), an
            :class:`Activation`, or a function of arrays.
        depth: ``L``, the number of layers, at least 1.
        sigma_w: ``σ_w``, positive.
        q: Variance of the preactivations, at least 0; 0 is the limit from above.
        count: How many moments, in [1, 12].

    Returns:
        An array ``(count,)``: the means of the eigenvalues of ``J Jᵀ`` and of their powers.

    Raises:
        ValueError: For an argument outside its range, or an activation that has no slope there,
            or none that can be found.

    Example:
        >>> from eoi_jax import mean_field
        >>> mean_field.predicted_moments("relu", 3, 2**0.5, 1.0).round(9)
        array([1., 4.])

    Reference:
        Pennington, Schoenholz and Ganguli, "The Emergence of Spectral Universality in Deep
        Networks", AISTATS 2018: σ²_{JJᵀ}, with s₁ = 0.
    """
    squares, weights = _squared_slopes(activation, q)
    sigma_w = _number(sigma_w, "sigma_w")
    depth = checks.integer(depth, low=1, name="depth")
    count = checks.integer(count, low=1, high=12, name="count")
    orders = np.arange(1, count + 1)
    mean = float((squares * weights).sum())
    series = np.array([((squares / mean) ** n * weights).sum() for n in range(1, count + 1)])
    # Lagrange inverts ψ(t) = t · series to χ(m), and S = (1 + m) χ(m) / m.
    inverse = np.array([_series_power(series, -n)[n - 1] / n for n in range(1, count + 1)])
    s_transform = inverse + np.append(0.0, inverse[:-1])
    moments = [
        special.comb(n, np.arange(n)[::-1]) @ _series_power(s_transform, -n * depth)[:n] / n
        for n in range(1, count + 1)
    ]
    return np.array(moments) * (sigma_w**2 * mean) ** (depth * orders)


def predicted_singular_values(
    activation: _ActivationLike, depth: int, sigma_w: float, q: float
) -> PredictedSpectrum:
    r"""Singular values that theory predicts for a deep Jacobian with Haar orthogonal weights.

    ``J`` is the product of ``D_l W_l`` with ``W_l / σ_w`` orthogonal and ``D_l`` the diagonal of
    ``φ'(√q z)``. For infinite width :math:`S_{JJ^T} = (S_{D^2} / \sigma_w^2)^L`, that is

    .. math:: x\, G_{JJ^T}(x) = w\, G_{D^2}(w), \qquad
        x = \sigma_w^{2L} w\, f^{L-1}, \qquad f = w - 1 / G_{D^2}(w).

    On each half circle of ``w``, ``x`` is real at one angle, the root of a monotone function. The
    mass above ``x`` is
    :math:`(L\, \mathbb{E} \arg(1 - D^2 / w) + (L - 1) \arg(w\, G_{D^2}(w))) / \pi`. An atom
    ``a > 0`` of ``|φ'|`` of mass ``p`` gives an atom of mass ``1 - L (1 - p)``, if positive, at
    ``(σ_w a)^L``; an atom at 0 keeps its mass ``p``. Quantiles have a relative error of about 1e-4;
    a slope below 1e-50 of the largest counts as 0.

    Args:
        activation: A name such as ``"tanh"`` (:func:`fixed_point` lists them), an
            :class:`Activation`, or a function of arrays.
        depth: ``L``, the number of layers, at least 1.
        sigma_w: ``σ_w``, positive.
        q: Variance of the preactivations, at least 0; 0 is the limit from above.

    Returns:
        A :class:`PredictedSpectrum`.

    Raises:
        ValueError: For an argument outside its range, an activation that has no slope there or
            none that can be found, or singular values beyond float64.

    Example:
        >>> from eoi_jax import mean_field
        >>> spectrum = mean_field.predicted_singular_values("relu", 4, 2**0.5, 1.0)
        >>> spectrum.atoms, spectrum.atom_masses.round(6), round(float(spectrum.quantile(1)), 3)
        (array([0.]), array([0.5]), 3.079)

    Reference:
        Pennington, Schoenholz and Ganguli, "The Emergence of Spectral Universality in Deep
        Networks", AISTATS 2018: S-transforms.
    """
    squares, weights = _squared_slopes(activation, q)
    sigma_w = _number(sigma_w, "sigma_w")
    depth = checks.integer(depth, low=1, name="depth")
    mean = float((squares * weights).sum())
    log_scale = depth / 2 * math.log(sigma_w**2 * mean)
    if abs(log_scale) > 600:
        problem = f"puts singular values at exp({log_scale:.0f}), outside the range of float64"
        raise checks.value_error("sigma_w", sigma_w, problem, "Give one nearer to critical_gain.")

    law = _uniform_pieces(squares, weights, mean)
    power = _free_power(law, depth)
    atoms = math.exp(log_scale) * np.sqrt(power.atoms)
    log_s = log_scale + power.log_x / 2
    # What float64 cannot hold as a singular value is left out.
    kept = log_s > -600.0
    if not kept.any():
        nothing = np.zeros(1)
        return PredictedSpectrum(nothing, nothing, nothing, atoms, power.atom_masses)
    grid = np.exp(log_s[kept])
    density = 2 * power.density[kept] / grid
    return PredictedSpectrum(grid, density, power.below[kept], atoms, power.atom_masses)


# --- expectations over Gaussian preactivations ------------------------------------------------


def _quadrature(activation: Activation, q: float) -> tuple[_Floats, _Floats]:
    """Nodes √q z and their weights, in panels within which the activation does not bend much."""
    scale = math.sqrt(max(q, 1e-300))  # at q = 0 each side of 0 keeps its sign
    bends = 2.0 ** np.arange(-2, 7)
    cuts = np.concatenate([bends, -bends, np.asarray(activation.kinks, float)]) / scale
    cuts = np.unique(np.append(cuts[np.abs(cuts) < 8.5], np.linspace(-8.5, 8.5, 257)))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = np.diff(cuts)[:, None] / 2
    z = cuts[:-1, None] + half * (1 + nodes)
    return scale * z, half * weights * _normal_density(z)


def _normal_density(z: _Floats) -> _Floats:
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _mean_square(activation: Activation, q: float) -> Any:
    """Return ``E[φ(√q z)²]``."""
    x, weights = _quadrature(activation, q)
    return (_evaluate(activation.function, x) ** 2 * weights).sum()


def _squared_slopes(activation: _ActivationLike, q: float) -> tuple[_Floats, _Floats]:
    """Squared derivatives and weights, an axis of panels and one of nodes within each."""
    q = _number(q, "q", zero=True)
    act = _resolved(_activation(activation), q)
    assert act.derivative is not None
    x, weights = _quadrature(act, q)
    slopes = _evaluate(act.derivative, x)
    if not slopes.any():
        problem = f"is outside the variances at which {activation!r} has a slope"
        raise checks.value_error("q", q, problem, "Change it, or the activation.")
    squares = slopes**2
    if (squares * weights)[[0, -1]].sum() > 1e-6 * (squares * weights).sum():
        problem = f"lets {activation!r} grow too fast for integrals over 8.5 standard deviations"
        raise checks.value_error("q", q, problem, "Give a smaller value.")
    return squares, weights


# --- derivatives of functions that come without one -------------------------------------------


_DEGREE = 15
_CHEBYSHEV = np.cos(math.pi * (np.arange(_DEGREE, -1, -1) + 0.5) / (_DEGREE + 1))
# A polynomial is tried between the points that it interpolates too, and at the ends.
_POINTS = np.append(_CHEBYSHEV, [-1 + 1e-6, -0.7071, -0.0331, 0.4142, 1 - 1e-6])
_MAX_PANELS = 20_000
_GIVE_DERIVATIVE = "Give mean_field.Activation(function, derivative, kinks)."


class _Panels(NamedTuple):
    """A function as one polynomial on each of many intervals, which are in order."""

    low: _Floats
    high: _Floats
    rounding: _Floats  # of the values
    coefficients: _Floats  # of Chebyshev polynomials, (degree + 1, intervals)

    def values(self, x: _Floats, index: Any) -> _Floats:
        """Value at ``x`` of the polynomial of each interval."""
        t = (2 * x - self.low[index] - self.high[index]) / (self.high - self.low)[index]
        of_x = self.coefficients[:, index]
        return np.asarray(np.polynomial.chebyshev.chebval(t, of_x, tensor=False))

    def slopes(self, x: Any) -> _Floats:
        """Derivative at ``x``; between two intervals that of the end of the first."""
        index = np.searchsorted(self.low, x, side="right").clip(1) - 1
        half = (self.high - self.low)[index] / 2
        t = ((x - self.low[index]) / half - 1).clip(-1, 1)
        of_t = np.polynomial.chebyshev.chebder(self.coefficients)[:, index]
        slopes = np.polynomial.chebyshev.chebval(t, of_t, tensor=False) / half
        slopes = np.where(np.abs(slopes) <= 10 * self.rounding[index] / half, 0.0, slopes)
        # Rounding would make many slopes of one, where a spectrum has an atom.
        largest = np.abs(slopes).max() or 1.0
        return np.asarray(np.round(slopes / largest, 11) * largest)


def _resolved(activation: Activation, q: float) -> Activation:
    """Give an activation that has no derivative one, and the kinks that it does not declare."""
    if activation.derivative is not None:
        return activation
    reach = max(8.5 * math.sqrt(q), 0.125)
    bends = 2.0 ** np.arange(-2, 7)
    cuts = np.concatenate([bends, -bends, np.asarray(activation.kinks, float)])
    # With q = 0 the slopes on both sides of 0 are asked for: hence an exact 0 among the cuts.
    cuts = np.unique(np.append(cuts[np.abs(cuts) < reach], np.arange(-32, 33) / 32 * reach))
    panels = _follow(activation.function, cuts)

    # A kink is left between two intervals, in a gap that is too narrow to matter.
    left, right = panels.high[:-1], panels.low[1:]
    index = np.arange(left.size)
    gap = right - left
    step = panels.values(right, index + 1) - panels.values(left, index)
    is_declared = (gap == 0) & np.isin(left, np.asarray(activation.kinks, float))
    noise = 20 * np.maximum(panels.rounding[1:], panels.rounding[:-1])
    before, after = panels.slopes(np.nextafter(left, -np.inf)), panels.slopes(right)
    further = panels.slopes(left - 100 * gap), panels.slopes(right + 100 * gap)
    slack = 0.05 * np.maximum(np.abs(before), np.abs(after))
    slack = (slack + 1e-3 * np.abs(before).max(initial=0)) * gap + noise
    # A kink may hide between the last point and the end.
    slack += 1e-6 * np.abs(after - before) * (panels.high[1:] - panels.low[:-1])
    is_bad = (step < np.minimum(before, after) * gap - slack) & ~is_declared
    is_bad |= (step > np.maximum(before, after) * gap + slack) & ~is_declared
    is_bad |= np.abs(further[0] - before) * gap > slack
    is_bad |= np.abs(further[1] - after) * gap > slack
    # At the scale of q a gap must be narrow too, or what is in it would matter.
    is_bad |= (gap > 1e-6 * math.sqrt(q)) & (np.abs(left) < max(8.5 * math.sqrt(q), 1e-6))
    # Nor may slopes change at every scale towards 0, if their limit there is asked for.
    is_bad |= (q == 0) & (
        (left == 0) & (panels.high[1:] < 1e-6) | (right == 0) & (panels.low[:-1] > -1e-6)
    )
    if is_bad.any():
        where = f"near {left[is_bad][0]:.6g}"
        problem = f"jumps, or its slope grows without bound, {where}, outside the functions of "
        problem += "a bounded slope"
        raise checks.value_error("activation", activation.function, problem, _GIVE_DERIVATIVE)
    edges = np.union1d(panels.low, panels.high)
    return Activation(activation.function, panels.slopes, tuple(edges))


def _follow(function: _Function, cuts: _Floats) -> _Panels:
    """Halve the intervals between cuts until a polynomial meets the function on each.

    Intervals of rounding's width on which none does are left out.
    """
    chebyshev = np.polynomial.chebyshev
    low, high = cuts[:-1], cuts[1:]
    found: list[_Panels] = []
    reaches, steepest = np.empty(0), np.empty(0)
    while low.size:
        middle, half = (low + high) / 2, (high - low) / 2
        x = middle[:, None] + half[:, None] * _POINTS
        # Few shapes, since functions of JAX are compiled for each.
        rows = max(64, 1 << (low.size - 1).bit_length())
        values, eps = _evaluate_with_eps(
            function, np.pad(x, ((0, rows - low.size), (0, 0)), "edge")
        )
        values = values[: low.size]
        if not np.isfinite(values).all():
            bad = x[~np.isfinite(values)][0]
            problem = f"is not finite at {bad:.6g}, outside the finite functions"
            raise checks.value_error("activation", function, problem, "Give a smaller q.")
        coefficients = chebyshev.chebfit(_CHEBYSHEV, values[:, : _DEGREE + 1].T, _DEGREE)
        reach, slope = np.maximum(np.abs(low), np.abs(high)), np.ptp(values, axis=1) / (high - low)
        if not reaches.size:
            order = np.argsort(reach, stable=True)
            reaches, steepest = reach[order], np.maximum.accumulate(slope[order])
        # What is rounded may be x, or what cancels, as 1 does in exp(x) - 1: of the size of the
        # slopes here, or between 0 and x, times x.
        slope = np.maximum(slope, np.interp(reach, reaches, steepest))
        size = np.maximum(np.abs(values).max(1), slope * np.maximum(reach, 0.25))
        rounding = 50 * eps * size
        misfit = np.abs(chebyshev.chebval(_POINTS, coefficients) - values).max(1)
        is_met = np.maximum(misfit / 4, np.abs(coefficients[-4:]).max(0)) <= rounding
        # Rounding must not bend what is straight.
        coefficients[np.abs(coefficients) <= rounding] = 0
        parts: Any = (low, high, rounding, coefficients)
        found.append(_Panels(*(part[..., is_met] for part in parts)))
        least = eps**0.6 * np.maximum(np.abs(middle), min(cuts[-1], 1.0))
        is_left = ~is_met & (half > least)
        if sum(part.low.size for part in found) + 2 * is_left.sum() > _MAX_PANELS:
            problem = f"bends too often between {cuts[0]:.3g} and {cuts[-1]:.3g}, outside the "
            problem += f"functions that {_MAX_PANELS} polynomials can follow"
            raise checks.value_error("activation", function, problem, _GIVE_DERIVATIVE)
        ends = low[is_left], middle[is_left], high[is_left]
        low, high = np.append(ends[0], ends[1]), np.append(ends[1], ends[2])
    joined = [np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)]
    order = np.argsort(joined[0])
    return _Panels(*(part[..., order] for part in joined))


def _evaluate(function: _Function, x: _Floats) -> _Floats:
    """Call an activation or its derivative."""
    return _evaluate_with_eps(function, x)[0]


def _evaluate_with_eps(function: _Function, x: _Floats) -> tuple[_Floats, float]:
    """Call an activation, and tell its unit of rounding; functions of JAX compute in float64."""
    remedy = "Give an elementwise function of arrays, such as jnp.tanh."
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        try:
            values = np.asarray(function(x))
        except Exception as error:
            problem = f"fails for a float64 array, outside the functions of arrays: {error}"
            raise checks.value_error("activation", function, problem, remedy) from error
    is_floating = jnp.issubdtype(values.dtype, jnp.floating)
    if values.shape != x.shape or not (is_floating or values.dtype.kind in "biu"):
        problem = f"returns shape {values.shape} and dtype {values.dtype} for {x.shape} and float64"
        raise checks.value_error("activation", function, problem, remedy)
    if is_floating and values.dtype.itemsize < 4:
        problem = f"returns dtype {values.dtype} for float64, outside float32 and float64"
        raise checks.value_error("activation", function, problem, "Let it compute in its input's.")
    eps = float(np.finfo(values.dtype if is_floating else np.float64).eps)
    return values.astype(np.float64), eps


# --- free multiplicative powers ---------------------------------------------------------------


class _Pieces(NamedTuple):
    """A law of mean 1 on [0, ∞) that is made of uniform pieces."""

    center: _Floats
    half: _Floats  # half the width of a piece, 0 for an atom
    mass: _Floats


class _Power(NamedTuple):
    """A free power of a law: a density along an axis of ``log x``, and atoms."""

    log_x: _Floats
    density: _Floats  # of log x
    below: _Floats  # mass below x, atoms left out
    atoms: _Floats
    atom_masses: _Floats


def _uniform_pieces(squares: _Floats, weights: _Floats, mean: float) -> _Pieces:
    """Approximate the law of the squared slopes, divided by their mean.

    Each panel becomes one piece of its mean and variance, so that both are exact for the law.
    """
    mass = weights.sum(1)
    squares = np.where(squares > 1e-100 * mean, squares, 0.0)
    is_flat = np.ptp(squares, axis=1) == 0
    center = np.where(is_flat, squares[:, 0], (squares * weights).sum(1) / mass) / mean
    variance = ((squares / mean - center[:, None]) ** 2 * weights).sum(1) / mass
    half = np.where(is_flat, 0.0, np.minimum(np.sqrt(3 * variance), center))
    return _Pieces(center, half, mass / mass.sum())


def _free_power(law: _Pieces, depth: int) -> _Power:
    """Return the law of the eigenvalues of a product of ``depth`` free matrices of one law.

    If ``x = w (w - 1 / G(w))^(L-1)`` with the Cauchy transform ``G`` of the law, then its ``L``-th
    free power has ``x G_L(x) = w G(w)``. One angle on each half circle of ``w``, the root of a
    monotone function, makes ``x`` real, so every point of the spectrum is found within a bracket.
    """
    center, half, mass = law
    deviation = math.sqrt(mass @ ((center - 1) ** 2 + half**2 / 3))
    atoms, index = np.unique(center[half == 0], return_inverse=True)
    masses = np.bincount(index, mass[half == 0], atoms.size).astype(float)
    masses = np.where(atoms > 0, 1 - depth * (1 - masses), masses)
    atoms, masses = atoms[masses > 1e-12], masses[masses > 1e-12]
    if deviation < 1e-10:  # one value, as float64 goes
        atoms, masses = np.ones(1), np.ones(1)
    if masses.sum() > 1 - 1e-6:
        empty = np.empty(0)
        return _Power(empty, empty, empty, atoms**depth, masses)

    # The ends of the spectrum are around values of the law, further away with depth.
    low, high, reach = center[center > 0].min(), center.max(), math.log(1e4 * depth)
    offsets = np.geomspace(deviation / 100, reach, 40)
    marks = np.log([low, high, 1.0, *atoms[atoms > 0]])[:, None] + np.append(offsets, -offsets)
    bottom = math.log(low) - (30 if 0 in atoms else reach)
    radii = np.append(marks, np.linspace(bottom, marks.max(), 150))

    least_angle = 1e-8 * min(1.0, deviation)
    table = np.empty((4, 0))
    for count in (100, 100, 200, 0):
        new = _on_real_axis(law, depth, np.unique(radii), least_angle)
        table = np.append(table, new, axis=1)
        table = table[:, np.argsort(table[0])]
        log_r, log_x, above, density = table
        below = 1 - above - (masses * (atoms < np.exp(log_r)[:, None])).sum(1)
        below = np.maximum.accumulate(below).clip(0, 1 - masses.sum())
        # The next radii: equal steps of mass, shorter where the mass ends, and the edges.
        t = (np.arange(count) + 0.5) / max(count, 1)
        radii = np.interp(below[-1] * t**3 * (10 - 15 * t + 6 * t**2), below, log_r)
        edges = np.flatnonzero(np.diff(density > 1e-8))
        radii = np.append(radii, np.linspace(log_r[edges], log_r[edges + 1], 22)[1:-1])
    first, *_, last = np.flatnonzero(density > 1e-8)
    kept = slice(first, last + 1)
    return _Power(log_x[kept], density[kept], below[kept], atoms**depth, masses)


def _on_real_axis(law: _Pieces, depth: int, log_r: _Floats, least_angle: float) -> _Floats:
    """For radii of w: log r, log x, mass above x, density of log x (0 outside the spectrum)."""
    center, half, mass = law

    def transform(angle: _Floats, log_r: _Floats) -> Any:
        w = np.exp(log_r + 1j * angle)
        v = w[:, None] - center
        y, is_near = half / v, np.abs(v) < 10 * half
        # arctanh(y) / y, by its series where y is small.
        y2 = np.where(is_near, 0, y) ** 2
        ratio = 1 + y2 * (1 / 3 + y2 * (1 / 5 + y2 * (1 / 7 + y2 * (1 / 9 + y2 / 11))))
        ratio[is_near] = np.arctanh(y[is_near]) / y[is_near]
        g = (mass * ratio / v).sum(1)
        return v, y, ratio, w * g, w - 1 / g

    def excess(log_angle: _Floats, log_r: _Floats) -> _Floats:
        f = transform(np.exp(log_angle), log_r)[-1]
        # Rounding may lift a negative f above the axis that it is on or below: hence the abs.
        return np.exp(log_angle) - (depth - 1) * np.arctan2(np.abs(f.imag), f.real)

    found = find_root(excess, (math.log(least_angle), math.log(math.pi)), args=(log_r,))
    # No root: outside the spectrum.
    angle = np.where(found.status == -1, least_angle, np.exp(found.x))
    v, y, ratio, wg, f = transform(angle, log_r)
    spread = (mass * (np.log(v) + np.log(1 - y**2) / 2 + ratio).imag).sum(1) - angle
    above = depth * spread - (depth - 1) * np.arctan2(np.abs(wg.imag), wg.real)
    density = np.where((angle > least_angle) | (depth == 1), -wg.imag, 0.0)
    log_x = log_r + (depth - 1) * np.log(np.abs(f))
    return np.stack([log_r, log_x, above / math.pi, density / math.pi])


def _series_power(series: _Floats, exponent: int) -> _Floats:
    """Power of a series that starts with 1, to as many terms."""
    power = np.ones(series.size)
    for n in range(1, series.size):
        k = np.arange(1, n + 1)
        power[n] = (k * (exponent + 1) - n) * series[1 : n + 1] @ power[n - k] / n
    return power


# --- arguments --------------------------------------------------------------------------------


def _activation(value: _ActivationLike) -> Activation:
    """Accept an activation by its name or as an elementwise function."""
    if isinstance(value, str):
        checks.one_of(value, tuple(_NAMED), name="activation", remedy="Or give a function.")
        return _NAMED[value]
    activation = value if isinstance(value, Activation) else Activation(value)
    for part in activation[:2]:
        if not callable(part) and (part is None) <= (part is activation.function):
            problem = "is no function, outside the names and the functions of arrays"
            raise checks.value_error("activation", part, problem, "Give 'relu', or jax.nn.relu.")
    for kink in activation.kinks:
        checks.number(kink, "activation.kinks")
    probe = np.linspace(-2.0, 2.0, 64)
    apart = _evaluate(activation.function, np.append(probe[:32], probe[:32]))[:32]
    together = _evaluate(activation.function, probe)[:32]
    if not np.allclose(apart, together, rtol=1e-4, atol=1e-6, equal_nan=True):
        problem = "has values that depend on one another, outside the elementwise functions"
        raise checks.value_error("activation", activation.function, problem, "Give one of them.")
    return activation


def _number(value: float, name: str, *, zero: bool = False) -> float:
    number = checks.number(value, name, interval="[0, inf)" if zero else "(0, inf)")
    if checks.is_traced(number):
        raise checks.value_error(name, value, "is being traced", "Give a static number.")
    return float(number)


def _selu(x: Any) -> Any:
    return _SELU_SCALE * np.where(x > 0, x, _SELU_ALPHA * np.expm1(x.clip(max=0)))


def _selu_slope(x: Any) -> Any:
    return _SELU_SCALE * np.where(x > 0, 1, _SELU_ALPHA * np.exp(x.clip(max=0)))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_IDENTITY = Activation(lambda x: x, np.ones_like)
_NAMED = {
    "identity": _IDENTITY,
    "linear": _IDENTITY,
    "tanh": Activation(np.tanh, lambda x: np.cosh(x.clip(-350, 350)) ** -2.0),
    "hard_tanh": Activation(
        lambda x: x.clip(-1, 1), lambda x: 1.0 * (np.abs(x) < 1), kinks=(-1.0, 1.0)
    ),
    "relu": Activation(lambda x: x.clip(0), lambda x: 1.0 * (x > 0), kinks=(0.0,)),
    "leaky_relu": Activation(
        lambda x: np.maximum(x, x / 100), lambda x: np.where(x > 0, 1, 0.01), kinks=(0.0,)
    ),
    "selu": Activation(_selu, _selu_slope, kinks=(0.0,)),
    "gelu": Activation(
        lambda x: x * special.ndtr(x), lambda x: special.ndtr(x) + x * _normal_density(x)
    ),
}
